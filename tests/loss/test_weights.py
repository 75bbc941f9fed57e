"""What is kept from call to call (plans, the weights of their sums) must never answer for other features."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch, random_features, reference_in
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ffr_ext import ffr_loss, functional, terms
from ffr_ext.options import FlowOptions
from ffr_ext.stages import Plan

SHAPE = (2, 4, 3, 5)
VARIANTS = {  # of one shape; a call on one must not use what was worked out for another
    "fp32": lambda x: x.detach(),
    "bf16": lambda x: x.detach().bfloat16(),
    "fp64": lambda x: x.detach().double(),
    "channels_last": lambda x: x.detach().to(memory_format=torch.channels_last),
    "every second": lambda x: x.detach().repeat_interleave(2, dim=-1)[..., ::2],
    "transposed": lambda x: x.detach().transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("order", list(itertools.permutations(VARIANTS, 2)), ids=" then ".join)
def test_features_of_one_shape_that_differ_otherwise(order: tuple[str, str], fused: str) -> None:
    plain = random_features(*[SHAPE] * 3)
    for name in (*order, order[0]):
        features = [VARIANTS[name](x).requires_grad_() for x in plain]
        assert_no_worse_than_torch(features, backend=fused)
        grads = torch.autograd.grad(ffr_loss(features, backend=fused), features)
        for feature, grad in zip(features, grads, strict=True):
            assert (grad.dtype, grad.shape) == (feature.dtype, feature.shape)


def test_weights_and_options_change_between_calls_on_the_same_features(fused: str) -> None:
    features = random_features(*[SHAPE] * 4)
    for gradient, curvature, norm, reduction in itertools.product(
        [0.0, 2.5, [1.0, 0.0, -3.0]], [1.0, [0.5, 2.0]], ["l1", "l2_squared"], ["mean", "sum"]
    ):
        assert_no_worse_than_torch(
            features, gradient=gradient, curvature=curvature, norm=norm, reduction=reduction, backend=fused
        )


def test_numbers_of_numpy_are_weights(fused: str) -> None:
    features = random_features(*[SHAPE] * 3)
    expected = ffr_loss(features, gradient=3.0, curvature=2.0, backend=fused)
    assert torch.equal(
        ffr_loss(features, gradient=np.float32(3), curvature=np.int64(2), backend=fused), expected
    )


def test_wanting_other_gradients_than_the_call_before(fused: str) -> None:
    plain = random_features(*[SHAPE] * 3)
    for wanted in itertools.product([True, False], repeat=3):
        features = [x.detach().requires_grad_(want) for x, want in zip(plain, wanted, strict=True)]
        assert_no_worse_than_torch(features, backend=fused)
    with torch.no_grad():
        assert not ffr_loss(plain, backend=fused).requires_grad


@pytest.mark.parametrize("upstream", [1.0, -0.5, 0.0, 1e-30])
def test_upstream_gradients(upstream: float, fused: str) -> None:
    assert_no_worse_than_torch(random_features(*[SHAPE] * 3), upstream, backend=fused)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_that_is_not_finite_is_the_reference_s(value: float, fused: str) -> None:
    features = [x.detach() for x in random_features(*[SHAPE] * 3)]
    features[1][0, 0, 0, 0] = value
    for gradient in (1.0, -1.0):  # inf - inf between the terms
        ours = ffr_loss(features, gradient=gradient, backend=fused)
        torch.testing.assert_close(
            ours, reference_in(torch.float32, features, gradient=gradient).loss, equal_nan=True
        )


def test_shapes_that_were_forgotten_are_planned_again(fused: str) -> None:
    kept = functional._kept_plan.cache_info().maxsize
    assert kept is not None
    first = random_features(*[(1, 7)] * 2)
    expected = ffr_loss(first, backend=fused)
    for size in range(8, 8 + kept + 1):
        ffr_loss([torch.zeros(1, size)] * 2, backend=fused)
    assert functional._kept_plan.cache_info().currsize == kept
    assert torch.equal(ffr_loss(first, backend=fused), expected)


# --- who looks on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1e35, -1e35])
def test_a_loss_too_large_for_float32_is_infinite(value: float, fused: str) -> None:
    """A run that diverges sees inf and can skip the step."""
    features = [torch.zeros(100_000), torch.full((100_000,), abs(value))]
    loss = ffr_loss(features, gradient=value / abs(value), reduction="sum", backend=fused)
    assert loss.item() == float("inf") * value


def test_a_default_device_moves_nothing(fused: str) -> None:
    for size in (8, 9):  # known from an earlier call, and not
        features = [torch.randn(2, size, requires_grad=True) for _ in range(3)]
        if size == 8:
            ffr_loss(features, backend=fused)
        with torch.device("meta"):
            loss = ffr_loss(features, backend=fused)
            loss.backward()
        assert loss.device.type == "cpu"
        assert all(f.grad is not None and f.grad.device.type == "cpu" for f in features)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_traced_graph_computes_the_loss_of_its_inputs(pre_dispatch: bool, fused: str) -> None:
    features = [torch.randn(2, 8) for _ in range(3)]
    ffr_loss(features, backend=fused)
    graph = make_fx(lambda *f: ffr_loss(f, backend=fused), pre_dispatch=pre_dispatch)(*features)
    other = [2 * f for f in features]
    torch.testing.assert_close(graph(*other), ffr_loss(other, backend=fused))


def test_a_traced_graph_of_the_gradient(fused: str) -> None:
    def gradient(*features: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(ffr_loss(features, backend=fused), features)

    features = [torch.randn(2, 8, requires_grad=True) for _ in range(3)]
    graph = make_fx(gradient)(*features)
    for traced, computed in zip(graph(*features), gradient(*features), strict=True):
        torch.testing.assert_close(traced, computed)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torch_jit_trace(fused: str) -> None:
    features = [torch.randn(2, 8) for _ in range(3)]
    module = torch.jit.trace(lambda a, b, c: ffr_loss([a, b, c], backend=fused), tuple(features))
    other = [2 * f for f in features]
    torch.testing.assert_close(module(*other), ffr_loss(other, backend=fused))


def test_a_fake_call_leaves_nothing_behind(fused: str) -> None:
    features = [torch.randn(2, 21) for _ in range(3)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(ffr_loss(features, backend=fused), FakeTensor)
    assert type(ffr_loss(features, backend=fused)) is Tensor


def test_compiled_autograd_takes_the_backward_pass_whole(fused: str) -> None:
    features = [torch.randn(2, 8, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(2 * ffr_loss(features, backend=fused), features)
    loss = 2 * ffr_loss(features, backend=fused)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    for feature, grad in zip(features, expected, strict=True):
        torch.testing.assert_close(feature.grad, grad)


# --- GPU streams and captured graphs, played on a CPU ------------------------------------------------


def plan_of(features: list[Tensor]) -> Plan:
    return functional._plan(features, "break", plain=True)


def units_of(features: list[Tensor]) -> list[terms._Units]:
    return [kept for kept in plan_of(features).kept.values() if isinstance(kept, terms._Units)]


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_weights_made_on_one_stream_are_not_read_on_another(
    norm: str, monkeypatch: pytest.MonkeyPatch, fused: str
) -> None:
    """Nothing makes another stream wait until they are there."""
    plan, options = plan_of([torch.zeros(3, 11)] * 3), FlowOptions(norm=norm)
    plan.kept.clear()
    read = []
    for stream in ("one", "other"):
        monkeypatch.setattr(terms, "_owner", lambda device, stream=stream: stream)
        read.append(terms.entry_weights(plan, options, 0.5, 1.0, torch.device("cpu")))
        assert terms.entry_weights(plan, options, 0.5, 1.0, torch.device("cpu")) is read[-1]
    one, other = plan.kept.values()
    assert one.gradient.data_ptr() != other.gradient.data_ptr()
    assert read[0].data_ptr() != read[1].data_ptr()
    assert torch.equal(*read)


@pytest.mark.parametrize("gradient", [0.3, [0.1, 0.2, 0.2, -0.3]], ids=["a number", "a list"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_weights_made_while_a_graph_is_captured(
    norm: str, gradient: float | list[float], monkeypatch: pytest.MonkeyPatch, fused: str
) -> None:
    """They have no values until it is replayed: nothing of them is kept, what is kept is not read (it may be forgotten
    before the replay), and nothing is copied from the host."""
    features = random_features(*[(3, 5)] * 3, *[(2, 7)] * 3)
    options: dict[str, Any] = dict(gradient=gradient, curvature=0.7, norm=norm, backend=fused)
    expected = ffr_loss(features, **options)
    kept = {id(units): units.last for units in units_of(features)}
    for units in units_of(features):
        units.gradient.fill_(torch.nan)  # whoever reads it shows it
    monkeypatch.setattr(terms, "_capturing", lambda device: True)
    monkeypatch.setattr(terms, "_owner", lambda device: None)
    monkeypatch.setattr(torch, "tensor", lambda *a, **k: pytest.fail("a copy from the host"))
    for _ in range(2):
        assert torch.equal(ffr_loss(features, **options), expected)
    assert {id(units): units.last for units in units_of(features)} == kept


@pytest.mark.parametrize("weights_of_terms", [[0.1, 0.2, 0.2], []], ids=["some", "none"])
def test_a_list_filled_in_by_kernels_is_the_list(
    weights_of_terms: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terms, "_capturing", lambda device: True)
    made = terms._on_device(weights_of_terms, torch.float32, torch.device("cpu"))
    assert torch.equal(made, torch.tensor(weights_of_terms))
