"""What is refused: the message names the argument and the layer, and nothing has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structured_nets import Residual, mlp
from torch import nn
from torch.nn.utils import parametrizations, prune

from ffr_ext.structured import StructuredOutput


def net(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), *middle, nn.Linear(4, 7))


def shared() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 6))
    model[3].weight = model[0].weight
    return model


def normed(layer: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(layer)


def pruned(layer: nn.Linear) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=1)


class Scaled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


M = mlp()
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "batch norm": (
        net(nn.BatchNorm1d(4)),
        {"last": slice(1, None)},
        r"last: 1 \(BatchNorm1d\) cannot be mirrored; pass mirror=<your module>",
    ),
    "pooling": (
        net(nn.MaxPool1d(1)),
        {"last": slice(1, None)},
        r"last: 1 \(MaxPool1d\) cannot be mirrored; pass mirror=",
    ),
    "residual": (
        net(Residual(4)),
        {"last": slice(1, None)},
        r"last: 1 \(Residual\) cannot be mirrored; pass mirror=",
    ),
    "softmax": (net(nn.Softmax(1)), {"last": slice(1, None)}, r"last: 1 \(Softmax\) cannot be mirrored"),
    "subclass": (net(Scaled(4, 4)), {"last": slice(1, None)}, r"last: 1 \(Scaled\) cannot be mirrored"),
    "circular padding": (
        nn.Sequential(nn.Conv1d(1, 2, 3), nn.Conv1d(2, 1, 3, padding=1, padding_mode="circular")),
        {"last": slice(1, None)},
        r"padding_mode='circular' cannot be mirrored",
    ),
    "flatten behind a convolution of last": (
        nn.Sequential(nn.Linear(3, 3), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(2, 1)),
        {"last": slice(1, None)},
        r"last: 2 \(Flatten\) cannot be mirrored, because y does not tell",
    ),
    "weight norm": (
        net(normed(nn.Linear(4, 4))),
        {"last": slice(1, None)},
        r"the weight of 1 \(\w+\) is no parameter but computed",
    ),
    "pruning mask": (
        net(pruned(nn.Linear(4, 4))),
        {"last": slice(1, None)},
        r"the weight of 1 \(Linear\) is no parameter but computed",
    ),
    "lazy": (
        nn.Sequential(nn.Linear(6, 4), nn.LazyLinear(7)),
        {"last": slice(1, None)},
        r"the weight of 1 \(LazyLinear\) has no shape yet",
    ),
    "shared": (
        shared(),
        {"first": slice(0, 1), "last": slice(3, None), "input": 1.0},
        r"first, last: expected no shared parameters, got 0\.weight",
    ),
    "overlap": (
        M,
        {"first": slice(0, 4), "last": slice(2, None), "input": 1.0},
        r"first, last: expected parts that do not overlap, got 2 \(Linear\) in both",
    ),
    "no link": (
        mlp(),
        {"first": slice(0, 4), "last": slice(4, None), "input": 1.0},
        r"at least one layer with weights between the two codes \(a \+ b < K\)",
    ),
    "not in order": (
        mlp(),
        {"last": ["6", "4"]},
        r"last: expected a chain in call order, but 6 \(Linear\) gives 7 and 4 \(Linear\) takes 4",
    ),
    "twice": (net(nn.Linear(4, 4)), {"last": ["1", "1"]}, r"last: expected every weight once"),
    "no weights": (mlp(), {"last": ["7"]}, r"last: expected layers with weights, got 7 \(Tanh\)"),
    "no weights to mirror": (
        net(nn.PReLU()),
        {"last": ["1"]},
        r"last: expected layers with weights, got 1 \(PReLU\)",
    ),
    "empty": (mlp(), {"last": []}, r"last: expected layers with weights, got none"),
    "no such name": (mlp(), {"last": "head"}, r"last: the model has no module named 'head'"),
    "of another model": (mlp(), {"last": mlp()[5:]}, r"last: this Tanh is not a module of the model"),
    "input without layers": (
        mlp(),
        {"last": slice(5, None), "input": 1.0},
        r"input: expected 0 without layers for it, got 1; pass first=",
    ),
    "output without layers": (
        mlp(),
        {"first": slice(0, 2), "input": 1.0},
        r"output: expected 0 without layers for it, got 1; pass last=",
    ),
    "nothing": (mlp(), {"output": 0.0}, r"first, last: expected the layers of at least one task"),
    "negative weight": (
        mlp(),
        {"last": slice(5, None), "output": -1.0},
        r"output: expected a finite number >= 0, got -1",
    ),
    "NaN weight": (
        mlp(),
        {"last": slice(5, None), "output": float("nan")},
        r"output: expected a finite number >= 0, got nan",
    ),
    "corruption": (
        mlp(),
        {"last": slice(5, None), "corruption": 1},
        r"corruption: expected a probability in \[0, 1\), got 1",
    ),
    "reconstruction": (
        mlp(),
        {"last": slice(5, None), "reconstruction": "relu"},
        r"reconstruction: expected 'auto', 'sigmoid', .* got 'relu'",
    ),
    "mirror": (
        mlp(),
        {"last": slice(5, None), "mirror": "own"},
        r"mirror: expected 'tied', 'free', .* got 'own'",
    ),
    "mirror key": (
        mlp(),
        {"last": slice(5, None), "mirror": {"last": nn.Linear(7, 3)}},
        r"mirror: expected the keys 'input' and 'output', got 'last'",
    ),
    "one mirror for two": (
        mlp(),
        {"first": slice(0, 2), "last": slice(5, None), "mirror": nn.Linear(7, 3)},
        r"mirror: one module cannot be the mirror of two chains",
    ),
    "mirror of the model": (
        M,
        {"last": slice(5, None), "mirror": M[6]},
        r"mirror: expected a module with parameters of its own",
    ),
    "scripted": (
        lambda: torch.jit.trace(net(), torch.rand(1, 6)),
        {"last": "1"},
        r"model: TopLevelTracedModule is scripted",
    ),
    "compiled": (
        lambda: torch.compile(net()),
        {"last": "1"},
        r"model: OptimizedModule is compiled; pass the module it was compiled from",
    ),
    "data parallel": (nn.DataParallel(net()), {"last": "1"}, r"model: DataParallel runs replicas in threads"),
    "compiled layer": (
        lambda: net(torch.compile(nn.Linear(4, 4))),
        {"last": slice(1, None)},
        r"last: OptimizedModule is compiled",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_it_cannot_be_made_from(case: str) -> None:
    made, options, message = CASES[case]
    model = made if isinstance(made, nn.Module) else made()
    parts = {key: model[value] if isinstance(value, slice) else value for key, value in options.items()}
    before = list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        StructuredOutput(model, **parts)
    assert (list(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "net"}, r"model: expected a torch.nn.Module, got str"),
        ({"last": 3}, r"last: expected a module, a slice of a Sequential, .* got int"),
        ({"output": "1"}, r"output: expected a number >= 0, got '1'"),
        ({"output": True}, r"output: expected a number >= 0, got True"),
        ({"reconstruction": 1}, r"reconstruction: expected a name or a callable, got int"),
        ({"mirror": 1}, r"mirror: expected 'tied', 'free', a module or a dict of them, got int"),
    ],
)
def test_an_argument_of_another_kind_is_refused(options: dict[str, Any], message: str) -> None:
    model = mlp()
    with pytest.raises(TypeError, match=message):
        StructuredOutput(**{"model": model, "last": model[5:], **options})


def batches() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    x, y = torch.rand(5, 6, dtype=torch.float64), torch.rand(8, 7, dtype=torch.float64)
    with_nan = y.clone()
    with_nan[3] = float("nan")
    return {
        "neither": ({}, ValueError, r"loss: expected x or y, got none"),
        "NaN": (
            {"x": x, "y": with_nan},
            ValueError,
            r"y: expected finite numbers, got 7 that are not, of 56; .*split",
        ),
        "infinity": ({"x": x, "y": y / 0}, ValueError, r"y: expected finite numbers, got 56"),
        "width of y": (
            {"x": x, "y": y[:, :5]},
            ValueError,
            r"y: 6 \(Linear\) gives tensors of shape \(B, ..., 7\), got \(8, 5\)",
        ),
        "width of x": (
            {"x": x[:, :5], "y": y},
            ValueError,
            r"x: 0 \(Linear\) takes tensors of shape \(B, ..., 6\), got \(5, 5\)",
        ),
        "one row": (
            {"x": x, "y": y[0]},
            ValueError,
            r"y: expected a batch of shape \(B, ...\), got shape \(7,\)",
        ),
        "dtype": (
            {"x": x, "y": y.float()},
            TypeError,
            r"y: expected torch.float64, as the layers have, got torch.float32",
        ),
        "classes": (
            {"x": x, "y": y.long()},
            TypeError,
            r"y: expected a floating-point tensor, got torch.int64",
        ),
        "a list": ({"x": x, "y": y.tolist()}, TypeError, r"y: expected a tensor, got list"),
        "device": (
            {"x": x, "y": y.to("meta")},
            ValueError,
            r"y: expected a tensor on cpu, as the layers are, got meta",
        ),
    }


@pytest.mark.parametrize("case", batches())
def test_a_batch_is_refused_with_everything_as_before(case: str) -> None:
    given, kind, message = batches()[case]
    model = mlp()
    tasks = StructuredOutput(model, first=model[:2], last=model[5:], input=1.0)
    tasks.loss(y=torch.rand(2, 7, dtype=torch.float64))
    terms, state = tasks.terms(), torch.get_rng_state()
    with pytest.raises(kind, match=message):
        tasks.loss(**given)
    assert tasks.terms().keys() == terms.keys()
    assert torch.equal(tasks.terms()["output"], terms["output"])
    assert torch.equal(torch.get_rng_state(), state)
    assert tasks.reconstruction == "auto"


def test_images_of_another_rank_or_size_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2)), nn.ConvTranspose2d(1, 2, 3, stride=2))
    tasks = StructuredOutput(model, last=model[1:])
    with pytest.raises(
        ValueError,
        match=r"y: 2 \(ConvTranspose2d\) gives tensors of shape \(B, 2, \.\.\., \.\.\.\), got \(3, 2, 5\)",
    ):
        tasks.loss(y=torch.rand(3, 2, 5))
    with pytest.raises(ValueError, match=r"y: of shape \(3, 2, 6, 6\), comes back as \(3, 2, 5, 5\)"):
        tasks.loss(y=torch.rand(3, 2, 6, 6))


def test_a_task_that_would_train_nothing_is_refused() -> None:
    model = mlp(torch.float32)
    tasks = StructuredOutput(model, last=model[5:])
    model[6].requires_grad_(False)
    with pytest.raises(ValueError, match=r"last: all parameters are frozen"):
        tasks.loss(y=torch.rand(2, 7))
    with torch.no_grad():
        assert tasks.loss(y=torch.rand(2, 7)) > 0  # to measure


def test_what_has_no_chain_cannot_be_looked_at() -> None:
    model = mlp(torch.float32)
    tasks = StructuredOutput(model, last=model[5:])
    with pytest.raises(
        ValueError, match=r"first: expected the layers of the input task, but first=None was given"
    ):
        tasks.reconstruct_input(torch.rand(2, 6))
    with pytest.raises(ValueError, match=r"loss: expected y, got none"):
        tasks.loss(x=torch.rand(2, 6))
    with pytest.raises(RuntimeError, match=r"terms: expected a call of loss"):
        tasks.terms()
    with pytest.raises(
        ValueError, match=r"weights: expected one or both of 'input' and 'output', got 'link'"
    ):
        tasks.scale_weights(0.5, "link")
    with pytest.raises(ValueError, match=r"scale: expected a finite number >= 0, got inf"):
        tasks.scale = float("inf")


def test_a_batch_without_rows_costs_nothing() -> None:
    model = mlp(torch.float32)
    tasks = StructuredOutput(model, first=model[:2], last=model[5:], input=1.0)
    x = torch.rand(3, 6)
    tasks.eval()
    assert torch.equal(tasks.loss(x=x, y=torch.empty(0, 7)), tasks.loss(x=x))
    assert tasks.loss(y=torch.empty(0, 7)) == 0
