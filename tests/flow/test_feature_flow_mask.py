"""Padded batches: where a call's mask comes from, and that it reaches the loss of that call."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from flow_models import Layer, assert_gradients_close, gradients, make_flow, one_pass, outputs
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss

needs_mask = pytest.mark.skipif(
    "mask" not in inspect.signature(ffr_loss).parameters, reason="needs ffr_loss(..., mask=)"
)


class Reader(nn.Module):
    """Reads padded sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(4) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> Tensor:
        return outputs(self.layers, x)[-1]


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.reader(batch["x"], batch["mask"])


def data() -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([5, 2])
    return torch.randn(2, 5, 4), torch.arange(5) < lengths[:, None]


def from_lengths(x: Tensor, mask: Any = None, *, lengths: Tensor) -> Tensor:
    return torch.arange(x.shape[1]) < lengths[:, None]


CALLS: dict[str, Any] = {
    "by keyword": ("mask", lambda model, x, mask: model(x, mask=mask)),
    "by position": ("mask", lambda model, x, mask: model(x, mask)),
    "by a function": (from_lengths, lambda model, x, mask: model(x, lengths=mask.sum(1))),
}


@pytest.mark.parametrize("by_hand", [False, True], ids=["a call", "a pass by hand"])
@pytest.mark.parametrize(("selector", "call"), CALLS.values(), ids=CALLS)
def test_the_mask_of_a_call_is_found(selector: Any, call: Any, by_hand: bool) -> None:
    model, (x, mask) = Reader(), data()
    with make_flow(model, list(model.layers), mask=selector) as flow:
        if by_hand:
            with one_pass(flow):
                call(model, x, mask)
                call(model, x, ~mask)
        else:
            call(model, x, mask)
        paths = flow._recorder.paths
        assert paths[0].mask is not None
        assert torch.equal(paths[0].mask, mask)
        if by_hand and isinstance(selector, str):
            assert torch.equal(paths[1].mask, ~mask)


def test_it_is_that_of_the_outermost_call_that_contains_the_layers() -> None:
    model, (x, mask) = Wrapped(), data()
    with make_flow(model, list(model.reader.layers), mask=lambda batch: batch["mask"]) as flow:
        model({"x": x, "mask": mask})
        assert flow._recorder.paths[0].mask is mask
    with make_flow(model, list(model.reader.layers), mask="mask") as flow:
        with one_pass(flow):  # as under Lightning, whose module is not called
            model.reader(x, mask)
        assert flow._recorder.paths[0].mask is mask


def test_a_call_without_a_mask_has_none() -> None:
    model, (x, _) = Reader(), data()
    with make_flow(model, list(model.layers), mask="mask") as flow:
        model(x)
        torch.testing.assert_close(flow.loss(), ffr_loss(outputs(model.layers, x), backend="reference"))


def test_each_path_may_have_its_own() -> None:
    model = nn.Transformer(4, 2, 2, 2, 8, batch_first=True)
    names = ["src_key_padding_mask", "tgt_key_padding_mask"]
    with make_flow(model, mask=names) as flow:
        x, mask = data()
        model(x, x, src_key_padding_mask=~mask, tgt_key_padding_mask=mask)
        assert [
            torch.equal(path.mask, m) for path, m in zip(flow._recorder.paths, (~mask, mask), strict=True)
        ] == [
            True,
            True,
        ]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (3, TypeError, "mask: expected the name of an argument of the call or a function.* got int"),
        (["a", "b", "c"], ValueError, "mask: expected one for each of the 1 paths, got 3"),
    ],
)
def test_a_wrong_selector_is_refused(mask: Any, error: type[Exception], message: str) -> None:
    model = Reader()
    with pytest.raises(error, match=message):
        FeatureFlow(model, list(model.layers), mask=mask)


def test_a_call_that_does_not_have_the_argument_is_an_error_that_names_what_it_has() -> None:
    model, (x, _) = Reader(), data()
    with (
        make_flow(model, list(model.layers), mask="padding") as flow,
        pytest.raises(
            ValueError, match="mask='padding': Reader, which was called, has the arguments x, mask"
        ),
    ):
        model(x)
    with (
        make_flow(model, list(model.layers), mask=lambda x: 3) as flow,
        pytest.raises(TypeError, match=r"expected a tensor or None of the call of Reader, got int"),
    ):
        model(x)
    assert not flow.attached


@needs_mask
def test_padding_neither_counts_nor_dilutes(backend: str) -> None:
    model, (x, mask) = Reader(), data()
    truth = ffr_loss(outputs(model.layers, x), mask=mask, backend=backend)
    true_gradients = gradients(model, truth)
    with FeatureFlow(model, list(model.layers), mask="mask", backend=backend) as flow:
        model(x, mask)
        loss = flow.loss()
        torch.testing.assert_close(loss, truth)
        assert_gradients_close(gradients(model, loss), true_gradients)
        with one_pass(flow):
            model(x, mask)
        torch.testing.assert_close(flow.loss(), truth)


@needs_mask
def test_the_mask_of_a_compiled_call(backend: str) -> None:
    torch._dynamo.reset()
    model, (x, mask) = Reader(), data()
    truth = ffr_loss(outputs(model.layers, x), mask=mask, backend=backend)
    with FeatureFlow(model, list(model.layers), mask="mask", backend=backend) as flow:
        torch.compile(model, fullgraph=True, backend="aot_eager")(x, mask)
        torch.testing.assert_close(flow.loss(), truth)
