"""Chains of layers for the tests of gradients just in time, and the two ways to get their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flow_models import gradients
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss


class Scale(nn.Module):
    """tanh(x * weight + bias) in any dtype and layout; `change` is applied to the result."""

    def __init__(self, channels: int, dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels).to(dtype))
        self.bias = nn.Parameter(torch.randn(channels).to(dtype))
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return self.change(torch.tanh(x * self.weight.view(shape) + self.bias.view(shape)))


class Chain(nn.Module):
    """Scales one after another; the features are their outputs."""

    def __init__(
        self,
        depth: int = 5,
        channels: int = 3,
        dtype: torch.dtype = torch.float64,
        change: Callable[[int, Tensor], Tensor] = lambda _index, x: x,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Scale(channels, dtype, lambda x, index=index: change(index, x)) for index in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)[-1]

    def features(self, x: Tensor) -> list[Tensor]:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x)
        return features


def flow_of(model: Any, **options: Any) -> FeatureFlow:
    return FeatureFlow(model, model.layers, backend="cpu", **options)


def tapped(model: Chain, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The penalty and the gradients of task + penalty, just in time."""
    with flow_of(model, **options) as flow:
        task = model(x).double().sum()
        penalty = flow.loss()
        assert "Collect" in graph_nodes(penalty), "the plain node was used: this test would prove nothing"
        return penalty.detach(), gradients(model, task + penalty)


def by_hand(model: Chain, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The same with one ffr_loss node over features returned by hand."""
    features = model.features(x)
    penalty = ffr_loss(features, backend="cpu", **options)
    return penalty.detach(), gradients(model, features[-1].double().sum() + penalty)


def graph_nodes(loss: Tensor) -> set[str]:
    """Class names, without "Backward", of the nodes behind a loss."""
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [following for following, _ in node.next_functions]
    return {node.name().removesuffix("Backward") for node in seen}
