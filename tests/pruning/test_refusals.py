"""What `compact` refuses: the message names the argument, what was expected and what came, and nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any, cast

import pytest
import torch
from pruning_models import X, dead
from torch import Tensor, nn

from ffr_ext import compact, sparsity, zero_small_filters


@pytest.mark.parametrize(
    "x", [torch.full((2, 3, 8, 8), float("nan")), torch.empty(0, 3, 8, 8)], ids=["NaN", "empty"]
)
def test_an_example_that_checks_nothing_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"example_inputs: Residual gives no finite number"):
        compact(dead(), x)


@pytest.mark.parametrize(
    "optimizer", ["adam", torch.optim.Adam, [torch.zeros(1)]], ids=["name", "class", "list"]
)
@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_no_optimizer_is_refused_before_the_model_runs(optimizer: Any, inplace: bool) -> None:
    model = dead()
    model.forward = lambda x: pytest.fail("the model was run")  # type: ignore[method-assign,assignment]
    with pytest.raises(TypeError, match=r"optimizer: expected the torch\.optim\.Optimizer.*got "):
        compact(model, torch.randn(X), optimizer=optimizer, inplace=inplace)


SPARSE = {
    "coo": lambda: torch.randn(X).to_sparse(),
    "csr": lambda: torch.randn(4, 4).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3, 8, 8)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(3, 8)], layout=torch.jagged),
    "in a tuple": lambda: (torch.randn(X).to_sparse(),),
    "in a dict": lambda: {"x": torch.randn(X).to_sparse()},
}


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_examples_that_are_not_dense_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"example_inputs: expected dense \(strided\) tensors, got "):
        compact(dead(), SPARSE[kind]())


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (torch.randn(1, 1, 8, 8), "RuntimeError: .*3 channels"),
        (torch.randn(X).double(), "RuntimeError: .*([Dd]ouble)"),
        ((torch.randn(X), torch.randn(X)), "TypeError: .*positional arguments"),
        ({"image": torch.randn(X)}, "TypeError: .*'image'"),
        (X, "TypeError: .*positional arguments"),
        ([[1.0, 2.0]], "TypeError: "),
    ],
    ids=["channels", "dtype", "too many", "name", "a shape", "numbers"],
)
def test_examples_that_do_not_fit_the_model_are_named(inputs: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"example_inputs: Residual fails on them in eval mode: {reason}"):
        compact(dead(), inputs)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_too_little_memory_is_not_called_a_wrong_model(error: type[Exception]) -> None:
    """Whichever of compact's runs of the model it stops: on the example, for the export, to count, to check."""
    raised = []

    def fails(at: int) -> bool:
        runs = count()

        class Limited(type(dead())):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Tensor:
                if next(runs) == at:
                    raise error("too much")
                return cast(Tensor, super().forward(x))

        model = dead()
        model.__class__ = Limited
        try:
            compact(model, torch.randn(X), measure=False)
        except error as problem:
            raised.append(str(problem))
        return next(runs) > at

    assert any(not fails(at) for at in range(50)), "the runs never end"
    assert len(raised) >= 4
    assert set(raised) == {"too much"}


def loops(x: Tensor) -> Tensor:
    return x * 2 if bool(x.sum() > 0) else x


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return loops(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compact(dead(), "image"), TypeError, "example_inputs: expected a tensor.*got str"),
        (lambda: compact(torch.randn(2), torch.randn(X)), TypeError, "model: expected an nn.Module"),
        (lambda: compact(dead(), torch.randn(X), round_to=0), ValueError, "round_to: expected.*got 0"),
        (lambda: compact(dead(), torch.randn(X), min_channels=1.5), ValueError, "min_channels.*got 1.5"),
        (lambda: compact(nn.DataParallel(dead()), torch.randn(X)), ValueError, "DataParallel.*model.module"),
        (lambda: compact(torch.compile(dead()), torch.randn(X)), ValueError, "OptimizedModule.*_orig_mod"),
        (
            lambda: compact(nn.Sequential(DataDependent()), torch.randn(X)),
            ValueError,
            "torch.export could not trace",
        ),
    ],
)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


class Packed(Tensor):
    """A weight whose numbers are elsewhere, as quantised and sharded ones are."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:  # as nn.Parameter asks
            return Tensor._make_wrapper_subclass(Packed, (4, 4), dtype=torch.float32)
        raise NotImplementedError(f"no {func} on packed numbers")


def packed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    del model[0].weight
    weight = Tensor._make_wrapper_subclass(Packed, (4, 4), dtype=torch.float32)
    model[0].register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return model.eval()


def integer_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return model


def sparse_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(torch.zeros(4, 4).to_sparse_csr())
    return model


def dynamically_quantised() -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    return cast(nn.Module, quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))))


def fake_quantised() -> nn.Module:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).train()
    model.qconfig = quantization.get_default_qat_qconfig()
    return cast(nn.Module, quantization.prepare_qat(model))


FIRST = "compact before you quantise, shard or otherwise wrap the weights"
NOT_DENSE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (packed, rf"0\.weight is a \S*Packed, whose numbers are not in a dense tensor: {FIRST}"),
    "integers": (integer_weight, rf"0 is quantised \(torch\.nn\S*Linear\): {FIRST}"),
    "sparse": (sparse_weight, r"0\.weight has layout torch\.sparse_csr: .*to_dense"),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(4)),
        r"0\.weight is not initialised yet: run the model once",
    ),
    "meta": (
        lambda: nn.Sequential(nn.Linear(4, 4)).to("meta"),
        r"0\.weight is on the device meta and has no values: load",
    ),
    "quantised": (dynamically_quantised, rf"0 is quantised \(\S*quantized\S*Linear\): {FIRST}"),
}


@pytest.mark.parametrize(
    "function",
    [
        lambda m: compact(m, torch.randn(2, 4)),
        sparsity,
        lambda m: zero_small_filters(m, 0.1),
        lambda m: zero_small_filters(m, 0.1, dry_run=True),
    ],
    ids=["compact", "sparsity", "zero_small_filters", "dry run"],
)
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_are_not_dense_are_refused_with_the_reason(kind: str, function: Any) -> None:
    make, reason = NOT_DENSE[kind]
    with pytest.raises(ValueError, match=reason):
        function(make())


@pytest.mark.filterwarnings("ignore")
def test_fake_quantised_modules_are_counted_but_not_cut() -> None:
    """Their weights are dense; but their observers move with every run, so no two runs compare."""
    model = fake_quantised()
    assert len(sparsity(model)) == 2
    with pytest.raises(ValueError, match=f"is fake-quantised .*{FIRST}.*before prepare_qat"):
        compact(model, torch.randn(2, 4))
