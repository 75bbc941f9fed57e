"""Gradients just in time: the numbers of `ffr_loss`, made one at a time, in every network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from flow_models import ResidualNet, assert_gradients_close, expected, gradients, images, task_loss
from taps_models import Chain, by_hand, flow_of, graph_nodes, tapped
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss, reference
from ffr_ext.flow import taps

pytestmark = pytest.mark.usefixtures("fused")


# --- the numbers ----------------------------------------------------------------------------------

PER_TERM = {"gradient": [1.0, 0.0, -2.0, 0.5], "curvature": torch.tensor([3.0, 0.0, 1.0])}


@pytest.mark.parametrize(
    "weights", [{}, {"gradient": 3.0, "curvature": 0.5}, PER_TERM], ids=["ones", "floats", "per term"]
)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
@pytest.mark.parametrize("kind", ["difference", "angle"])
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_loss_and_gradients_are_those_of_ffr_loss(
    norm: str, kind: str, reduction: str, weights: dict[str, Any]
) -> None:
    model, x = Chain(), torch.randn(4, 3, 5, 7, dtype=torch.float64)
    options = {"norm": norm, "curvature_kind": kind, "reduction": reduction, **weights}
    penalty, grads = tapped(model, x, **options)
    truth, true_grads = by_hand(model, x, **options)
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


def shrinking(index: int, x: Tensor) -> Tensor:
    """Two more channels and half the size after features 2 and 3: stages of 3, 1 and 2 features."""
    if index in (2, 3):
        x = nn.functional.avg_pool2d(x, 2)
    return x


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
@pytest.mark.parametrize("kind", ["difference", "angle"])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 32)], ids=["square", "rectangle"])
def test_terms_across_stage_boundaries(norm: str, kind: str, sizes: tuple[int, int]) -> None:
    model, x = Chain(6, change=shrinking), torch.randn(2, 3, *sizes, dtype=torch.float64)
    options = {"norm": norm, "curvature_kind": kind, "transition": "pool", "reduction": "sum"}
    penalty, grads = tapped(model, x, **options)
    truth, true_grads = by_hand(model, x, **options)
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


class Widening(nn.Module):
    """Linear layers with more and more features: pooling pads channels, and only that."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [4, 4, 4, 6, 6, 9]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise([3, *sizes]))
        self.double()

    forward, features = Chain.forward, Chain.features


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_terms_across_boundaries_that_only_add_channels(norm: str) -> None:
    model, x = Widening(), torch.randn(5, 3, dtype=torch.float64)
    penalty, grads = tapped(model, x, norm=norm, transition="pool")
    truth, true_grads = by_hand(model, x, norm=norm, transition="pool")
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


def test_unpool_is_the_adjoint_of_pooling() -> None:
    x = torch.randn(2, 3, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    pooled = reference.pool_to(x, torch.Size((2, 5, 2, 2, 2)))
    upstream = torch.randn_like(pooled)
    (truth,) = torch.autograd.grad(pooled, x, upstream)
    torch.testing.assert_close(taps.unpool(upstream, x.shape), truth)


LAYOUTS = {
    "channels_last": lambda _index, x: x.contiguous(memory_format=torch.channels_last),
    "mixed": lambda index, x: x.contiguous(memory_format=torch.channels_last) if index % 2 else x,
    "transposed": lambda _index, x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda _index, x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda _index, x: x[..., :1].expand_as(x),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_layouts(norm: str, change: Callable[[int, Tensor], Tensor]) -> None:
    model, x = Chain(change=change), torch.randn(4, 3, 5, 6, dtype=torch.float64)
    penalty, grads = tapped(model, x, norm=norm)
    truth, true_grads = by_hand(model, x, norm=norm)
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


DTYPES = {
    "bf16": lambda _index, x: x.bfloat16(),
    "fp16": lambda _index, x: x.half(),
    "fp32": lambda _index, x: x.float(),
    "bf16 and fp32": lambda index, x: x.bfloat16() if index % 2 else x.float(),
    "fp16 and bf16": lambda index, x: x.bfloat16() if index == 2 else x.half(),
    "fp32 and fp64": lambda index, x: x.double() if index > 2 else x.float(),
}


@pytest.mark.parametrize("change", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_dtypes(norm: str, change: Callable[[int, Tensor], Tensor]) -> None:
    """Each feature's own gradient, before autograd adds anything to it, is the very same number."""
    model, x = Chain(change=change), torch.randn(4, 3, 9, dtype=torch.float64)
    with flow_of(model, norm=norm) as flow:
        kept: list[Tensor] = []
        for layer in model.layers:
            layer.register_forward_hook(lambda _module, _args, output: kept.append(output))
        model(x)
        penalty = flow.loss()
    leaves = [feature.detach().requires_grad_() for feature in kept]
    truth = ffr_loss(leaves, norm=norm, backend="cpu")
    truth.backward()
    (last,) = torch.autograd.grad(penalty, kept[-1])
    assert penalty.dtype == truth.dtype
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    torch.testing.assert_close(last, leaves[-1].grad, rtol=0, atol=0)


# --- odd networks ---------------------------------------------------------------------------------


def test_only_features_that_require_grad_get_a_tap() -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    for layer in model.layers[:3]:
        layer.requires_grad_(False)
    for norm in ("l1", "l2"):
        _, truth = by_hand(model, x, norm=norm)
        with flow_of(model, norm=norm) as flow:
            task = model(x).sum()
            assert [tap is not None for tap in flow._recorder.path.taps] == [False] * 3 + [True] * 2
            assert_gradients_close(gradients(model, task + flow.loss()), truth, 1e-13)


class Repeats(nn.Module):
    """The same tensor as two features, a leaf as a feature, and two features of one node."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(6, 6, dtype=torch.float64))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(5))

    def features(self, x: Tensor) -> list[Tensor]:
        y = torch.tanh(x @ self.weight)
        left, right = torch.cat([y, y * 2], 1).chunk(2, 1)
        given = [self.leaf, y, y, left, right]
        return [layer(feature) for layer, feature in zip(self.layers, given, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_tensor_captured_twice_a_leaf_and_two_outputs_of_one_node(norm: str) -> None:
    model, x = Repeats(), torch.randn(4, 6, dtype=torch.float64)
    penalty, grads = tapped(model, x, norm=norm)
    truth, true_grads = by_hand(model, x, norm=norm)
    torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
    assert_gradients_close(grads, true_grads, 1e-13)


def test_two_flows_on_one_model_do_not_meet() -> None:
    model, x = ResidualNet(), images()
    logits, features = model.features(x)
    truth = gradients(
        model,
        task_loss(logits)
        + ffr_loss(features, backend="cpu")
        + 3 * ffr_loss(features[::2], norm="l2", transition="pool", backend="cpu"),
    )
    every = FeatureFlow(model, backend="cpu")
    second = ["early.0", "early.2", "late.1"]
    with every, FeatureFlow(model, second, norm="l2", transition="pool", backend="cpu") as some:
        loss = task_loss(model(x)) + every.loss() + 3 * some.loss()
        assert_gradients_close(gradients(model, loss), truth)


def test_features_and_losses_of_two_steps_can_be_alive_at_once() -> None:
    """Two forwards, two losses, and only then the backward passes, in the wrong order."""
    model = ResidualNet().eval()
    inputs = [images(2), images(4)]
    truths = [expected(model, x, norm="l2", backend="cpu")[1] for x in inputs]
    with FeatureFlow(model, norm="l2", backend="cpu", capture_eval=True) as flow:
        losses = [task_loss(model(x)) + flow.loss() for x in inputs]
        for loss, truth in zip(losses, truths, strict=True):
            assert_gradients_close(gradients(model, loss), truth)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_each_call_in_a_pass_by_hand_has_taps_of_its_own(norm: str) -> None:
    model, inputs = Chain(), [torch.randn(batch, 3, 5, dtype=torch.float64) for batch in (4, 2)]
    truths = [by_hand(model, x, norm=norm) for x in inputs]
    with flow_of(model, norm=norm) as flow:
        flow.begin_pass()
        task = sum(model(x).sum() for x in inputs)
        flow.end_pass()
        penalty = flow.loss()
    assert not {"FlowStats", "FlowProduct"} & set(graph_nodes(penalty)), (
        "no node that makes all gradients at once"
    )
    torch.testing.assert_close(penalty.detach(), truths[0][0] + truths[1][0], rtol=0, atol=0)
    true_grads = [a + b for a, b in zip(truths[0][1], truths[1][1], strict=True)]
    assert_gradients_close(gradients(model, task + penalty), true_grads, 1e-13)


@pytest.mark.parametrize("shape", [(0, 3, 5), (1, 3, 1), (2, 3, 0)], ids=str)
def test_empty_and_tiny_features(shape: Sequence[int]) -> None:
    for norm in ("l1", "l2"):
        model, x = Chain(), torch.randn(*shape, dtype=torch.float64)
        penalty, grads = tapped(model, x, norm=norm)
        truth, true_grads = by_hand(model, x, norm=norm)
        torch.testing.assert_close(penalty, truth, rtol=0, atol=0)
        assert_gradients_close(grads, true_grads, 1e-13)


# --- where there can be no taps -------------------------------------------------------------------


def test_the_reference_backend_and_torch_func_use_one_node() -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    with FeatureFlow(model, model.layers, backend="reference") as flow:
        model(x)
        assert "Collect" not in graph_nodes(flow.loss())

    parameters = dict(model.named_parameters())
    with flow_of(model) as flow:

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).sum() + flow.loss()

        grads = torch.func.grad(loss)(parameters)
    _, truth = by_hand(model, x)
    assert_gradients_close([*grads.values()], truth, 1e-13)


# --- mixed precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grad_scaler_and_autocast(dtype: torch.dtype) -> None:
    """A step under GradScaler changes the parameters as the plain node does, and an inf skips it."""
    results = []
    for use_taps in (True, False):
        torch.manual_seed(0)
        model, x = ResidualNet(), images()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        flow = FeatureFlow(model, backend="cpu")
        flow._recorder.tapping = use_taps
        with flow:
            for overflow in (False, True):
                with torch.autocast("cpu", dtype=dtype):
                    loss = task_loss(model(x)) + flow.loss()
                optimizer.zero_grad()
                scaler.scale(loss * (float("inf") if overflow else 1)).backward()
                before = model.stem.weight.detach().clone()
                scaler.step(optimizer)
                scaler.update()
                assert torch.equal(before, model.stem.weight) == overflow
        assert scaler.get_scale() == 512.0
        results.append([p.detach().clone() for p in model.parameters()])
    assert_gradients_close(results[0], results[1], 0.02)


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("side_stream", [False, True], ids=["one stream", "every layer on another stream"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_on_a_gpu(norm: str, side_stream: bool) -> None:
    model, x = Chain(8).cuda(), torch.randn(64, 3, 64, 64, dtype=torch.float64, device="cuda")
    _, truth = by_hand_on(model, x, norm)
    if side_stream:
        for layer in model.layers:
            layer.change = on_another_stream
    for _ in range(3):
        with FeatureFlow(model, model.layers, norm=norm) as flow:
            grads = gradients(model, model(x).sum() + flow.loss())
        torch.cuda.synchronize()
        assert_gradients_close(grads, truth, 1e-12)


def by_hand_on(model: Chain, x: Tensor, norm: str) -> tuple[Tensor, list[Tensor | None]]:
    features = model.features(x)
    penalty = ffr_loss(features, norm=norm)
    return penalty.detach(), gradients(model, features[-1].sum() + penalty)


def on_another_stream(x: Tensor) -> Tensor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = x * 1
    torch.cuda.current_stream().wait_stream(stream)
    y.record_stream(torch.cuda.current_stream())
    return y
