"""Random graphs of the supported ops with random dead filters: whatever `compact` removes, the outputs
stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from random_nets import RandomNet
from torch import Tensor, nn

from ffr_ext import compact

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

KINDS = (
    *(
        "conv",
        "conv",
        "conv",
        "norm",
        "norm",
        "activation",
        "activation",
        "add",
        "add",
    ),  # the common ones more often
    *("sub", "mul", "cat", "gate", "squeeze-excite", "pool", "average", "depthwise", "grouped", "in-place"),
    *("group-norm", "reuse"),
)
ACTIVATIONS = ("relu", "silu", "sigmoid", "tanh", "hardswish", "leaky_relu", "gelu")


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    channels = [3]
    steps: list[tuple[Any, ...]] = []
    layers: dict[str, nn.Module] = {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def add_layer(layer: nn.Module, source: int, out: int) -> None:
        name = f"l{len(layers)}"
        layers[name] = layer
        steps.append(("layer", name, source))
        channels.append(out)

    def dead(count: int) -> Tensor:
        return torch.rand(count, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9]))

    add_layer(_conv(3, 8, 3, 1, draw(st.booleans()), dead(8), generator), 0, 8)
    for _ in range(draw(st.integers(2, 9))):
        source = draw(st.integers(1, len(channels) - 1))
        c = channels[source]
        same = [i for i in range(1, len(channels)) if channels[i] == c]
        kind = draw(st.sampled_from(KINDS))
        if kind == "conv":
            out = draw(st.sampled_from([4, 8, c]))
            layer = _conv(c, out, draw(st.sampled_from([1, 3])), 1, draw(st.booleans()), dead(out), generator)
            add_layer(layer, source, out)
        elif kind == "depthwise":
            add_layer(_conv(c, c, 3, c, draw(st.booleans()), dead(c), generator), source, c)
        elif kind == "grouped" and c % 2 == 0:
            add_layer(_conv(c, 8, 3, 2, draw(st.booleans()), dead(8), generator), source, 8)
        elif kind == "norm":
            add_layer(_norm(c, dead(c), generator), source, c)
        elif kind == "group-norm" and c % 4 == 0:
            group_norm = nn.GroupNorm(c // 4, c)
            with torch.no_grad():
                group_norm.weight.copy_(torch.randn(c, generator=generator)).masked_fill_(
                    dead(c // 4).repeat_interleave(4), 0
                )
            add_layer(group_norm, source, c)
        elif kind == "reuse" and channels[1:].count(8) > 1:
            again = [s for s in steps if s[0] == "layer" and isinstance(layers[s[1]], nn.Conv2d)]
            step = draw(st.sampled_from(again))
            fitting = [i for i in range(len(channels)) if channels[i] == layers[step[1]].in_channels]
            steps.append(("layer", step[1], draw(st.sampled_from(fitting))))
            channels.append(layers[step[1]].out_channels)
        elif kind == "squeeze-excite":
            name = f"l{len(layers)}"
            layers[name] = _conv(c, c, 1, 1, True, dead(c), generator)
            steps.append((kind, name, source))
            channels.append(c)
        elif kind == "activation":
            steps.append((kind, draw(st.sampled_from(ACTIVATIONS)), source))
            channels.append(c)
        elif kind in ("add", "sub", "mul"):
            steps.append((kind, source, draw(st.sampled_from(same))))
            channels.append(c)
        elif kind == "cat" and c <= 16:
            other = draw(st.integers(0, len(channels) - 1))
            steps.append((kind, [source, other]))
            channels.append(c + channels[other])
        elif kind == "gate" and c % 2 == 0:
            steps.append((kind, source))
            channels.append(c // 2)
        elif kind in ("pool", "average", "in-place"):
            steps.append((kind, source))
            channels.append(c)
    c = channels[-1]
    if draw(st.booleans()):
        head: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(c * 25, 3))
    else:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 3))
    return RandomNet(steps, layers, head).eval()


def _conv(
    i: int, o: int, k: int, groups: int, bias: bool, dead: Tensor, generator: torch.Generator
) -> nn.Conv2d:
    layer = nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=bias)
    with torch.no_grad():
        layer.weight.copy_(
            torch.randn(layer.weight.shape, generator=generator) / (i * k * k // groups) ** 0.5
        )
        layer.weight[dead] = 0
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(o, generator=generator))
            layer.bias[dead & (torch.rand(o, generator=generator) < 0.6)] = 0
    return layer


def _norm(channels: int, dead: Tensor, generator: torch.Generator) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.copy_(torch.randn(channels, generator=generator))
        layer.running_var.copy_(0.5 + torch.rand(channels, generator=generator))
        layer.weight[dead] = 0
        layer.bias[dead & (torch.rand(channels, generator=generator) < 0.6)] = 0
    return layer


@st.composite
def residual_networks(draw: st.DrawFn) -> nn.Module:
    """A stream that several padded and unpadded readers read, each behind its own activation, with constants."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    layers: dict[str, nn.Module] = {}
    steps: list[tuple[Any, ...]] = []
    channels = [3]

    def add(step: tuple[Any, ...], out: int) -> int:
        steps.append(step)
        channels.append(out)
        return len(channels) - 1

    def layer(module: nn.Module, source: int, out: int) -> int:
        layers[f"l{len(layers)}"] = module
        return add(("layer", f"l{len(layers) - 1}", source), out)

    def dead(count: int) -> Tensor:
        return torch.rand(count, generator=generator) < draw(st.sampled_from([0.3, 0.6, 0.9]))

    stream = layer(_conv(3, 8, 3, 1, True, dead(8), generator), 0, 8)
    if draw(st.booleans()):
        stream = layer(_norm(8, dead(8), generator), stream, 8)
    for _ in range(draw(st.integers(1, 4))):
        inner = stream
        if draw(st.booleans()):
            inner = layer(_norm(8, dead(8), generator), inner, 8)
        inner = add(("activation", draw(st.sampled_from(ACTIVATIONS)), inner), 8)
        kernel, groups = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 1, 1, 2]))
        reader = _conv(8, 8, kernel, groups, draw(st.booleans()), dead(8), generator)
        if draw(st.booleans()):  # as wide, and padded otherwise: only on one side, or with a dilation
            reader.dilation, reader.padding = (2, 2), (kernel - 1, kernel - 1)
        inner = layer(reader, inner, 8)
        if draw(st.booleans()):
            inner = layer(_norm(8, dead(8), generator), inner, 8)
        stream = add((draw(st.sampled_from(["add", "add", "sub"])), stream, inner), 8)
    head = nn.Sequential(nn.Conv2d(8, 4, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(4 * 9, 3))
    return RandomNet(steps, layers, head).eval()


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(residual_networks(), st.booleans())
def test_constants_of_residual_streams(model: nn.Module, half: bool) -> None:
    """Constants leave whatever reads them, except as many as carry them; the plan does the same once more."""
    x = torch.randn(2, 3, 5, 5)
    result = compact(model, x, measure=False)
    assert not result.report.notes
    with torch.no_grad():
        expected = model(x).double()
        error = (result.model(x).double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    assert error < 1e-5
    once_more = result.plan.apply(copy.deepcopy(model))
    assert all(
        torch.equal(a, b) for a, b in zip(once_more.parameters(), result.model.parameters(), strict=True)
    )
    assert compact(result.model, x, measure=False).plan.is_empty, result.report.explain()
    if half:
        low = copy.deepcopy(model).bfloat16()
        assert not compact(low, x.bfloat16(), measure=False).report.notes


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(networks(), st.sampled_from([1, 1, 2, 4]))
def test_random_graphs(model: nn.Module, round_to: int) -> None:
    x = torch.randn(2, 3, 5, 5)
    result = compact(model, x, round_to=round_to, measure=False)
    assert not result.report.notes, "nothing here has sizes in its forward code"
    for inputs in (x, torch.randn(3, 3, 5, 5)):
        with torch.no_grad():
            expected = model(inputs).double()
            error = (result.model(inputs).double() - expected).abs().max() / expected.abs().max().clamp(
                min=1.0
            )
        assert error < 1e-5
    again = compact(result.model, x, round_to=round_to, measure=False)
    assert again.plan.is_empty, again.report.explain()
