"""Gradients just in time: when each is made, what is alive until then, and what that costs in memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from taps_models import Chain, flow_of
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss

pytestmark = pytest.mark.usefixtures("fused")


# --- when things happen ---------------------------------------------------------------------------


def test_each_gradient_is_made_right_before_its_layers_own_backward() -> None:
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *_args: order.append(name)

    model, x = Chain(4), torch.randn(2, 3, 5, dtype=torch.float64)
    with flow_of(model) as flow:
        for index, layer in enumerate(model.layers):
            layer.register_forward_hook(
                lambda _module, _args, output, index=index: (
                    output.grad_fn.register_hook(note(f"layer {index}")) and None
                )
            )
        task = model(x).sum()
        for index, (_slot, token) in enumerate(flow._recorder.path.taps):
            token.grad_fn.register_hook(note(f"tap {index}"))
        (task + flow.loss()).backward()
    assert order == [f"{kind} {index}" for index in (3, 2, 1, 0) for kind in ("tap", "layer")]


def peak_of_backward(features: int, run: Callable[[Tensor, list[nn.Module]], Tensor]) -> int:
    """Peak bytes that forward and backward allocate, from the profiler's memory events."""
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()) for _ in range(features)]
    x = torch.randn(4, 8, 64, 64)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        run(x, blocks).backward()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert changes, "the profiler saw no memory events"
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_l1_costs_at_most_a_quarter_of_the_features_in_peak_memory() -> None:
    """12 fp32 features: signs are 11/12 x 1/8 of the features' bytes, one gradient is 1/12: 0.198 in all."""

    def without(x: Tensor, blocks: list[nn.Module]) -> Tensor:
        return nn.Sequential(*blocks)(x).square().sum()

    def just_in_time(x: Tensor, blocks: list[nn.Module]) -> Tensor:
        model = nn.Sequential(*blocks)
        with FeatureFlow(model, list(model), backend="cpu") as flow:
            return model(x).square().sum() + flow.loss()

    def one_node(x: Tensor, blocks: list[nn.Module]) -> Tensor:
        features = []
        for block in blocks:
            x = block(x)
            features.append(x)
        return x.square().sum() + ffr_loss(features, backend="cpu")

    count, size = 12, 4 * 4 * 8 * 64 * 64
    for run in (without, just_in_time, one_node):  # the second time: no first-call allocations
        peak_of_backward(count, run)
    base, tapped_peak, node_peak = (peak_of_backward(count, run) for run in (without, just_in_time, one_node))
    assert tapped_peak - base <= 0.25 * count * size
    assert node_peak - base > 0.9 * count * size, "one node for all gradients costs what taps save"


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_nothing_of_the_loss_is_alive_after_the_last_tap(norm: str) -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    alive: list[weakref.ref[Tensor]] = []
    with flow_of(model, norm=norm) as flow:
        for layer in model.layers:
            layer.register_forward_hook(lambda _m, _a, output: alive.append(weakref.ref(output)))
        task = model(x).sum()
        (slot, _token) = flow._recorder.path.taps[0]
        penalty = flow.loss()
        (walk, _place) = slot.places[0]
        (task + penalty).backward()
    assert walk.live is None
    del task
    assert [reference() for reference in alive] == [None] * 5


def test_values_are_let_go_while_the_backward_pass_goes_down() -> None:
    """For norms that need values: the gradient of layer l needs no feature beyond l + 2."""
    model, x = Chain(6), torch.randn(4, 3, 5, dtype=torch.float64)
    held: list[list[bool]] = []
    kept: list[Tensor] = []
    with flow_of(model, norm="l2") as flow:
        for layer in model.layers:
            layer.register_forward_hook(lambda _m, _a, output: kept.append(output))
        model(x)
        (slot, _token) = flow._recorder.path.taps[0]
        penalty = flow.loss()
        (walk, _place) = slot.places[0]
        for feature in kept:  # right after a layer's own backward
            feature.grad_fn.register_hook(
                lambda *_args: held.append([v is not None for v in walk.live.values] if walk.live else [])
            )
        penalty.backward()
    assert held[0] == [True] * 6  # layer 5, whose gradient needs 3, 4, 5; taps 4 and 3 need 5 too
    assert held[2] == [True] * 5 + [False]  # layer 3
    assert held[4] == [True] * 3 + [False] * 3  # layer 1; tap 0 needs 0, 1, 2
    assert held[5] == []


# --- GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_peak_memory_on_a_gpu() -> None:
    peaks = []
    for use_flow in (False, True):
        model = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()) for _ in range(12))).cuda()
        flow = FeatureFlow(model, list(model)) if use_flow else None
        for _ in range(2):  # the second step: the first one's workspaces are there
            if flow is not None:
                flow.attach()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = model(torch.randn(4, 8, 256, 256, device="cuda")).square().sum()
            (loss if flow is None else loss + flow.loss()).backward()
            peak = torch.cuda.max_memory_allocated() - before
        peaks.append(peak)
    assert peaks[1] - peaks[0] <= 0.25 * 12 * 4 * 4 * 8 * 256 * 256
