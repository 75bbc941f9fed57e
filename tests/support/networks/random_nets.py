"""Networks made of random steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomNet(nn.Module):
    """A list of steps; each takes earlier feature maps of one spatial size and adds one."""

    def __init__(self, steps: list[tuple[Any, ...]], layers: dict[str, nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict(layers)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for kind, *arguments in self.steps:
            maps.append(self.step(kind, maps, *arguments))
        return self.head(maps[-1])

    def step(self, kind: str, maps: list[Tensor], *arguments: Any) -> Tensor:
        if kind == "layer":
            return self.layers[arguments[0]](maps[arguments[1]])
        if kind == "activation":
            return getattr(F, arguments[0])(maps[arguments[1]])
        if kind == "in-place":
            return F.relu_(maps[arguments[0]] * 1.0)
        if kind == "add":
            return maps[arguments[0]] + maps[arguments[1]]
        if kind == "sub":
            return maps[arguments[0]] - 0.5 * maps[arguments[1]]
        if kind == "mul":
            return maps[arguments[0]] * maps[arguments[1]]
        if kind == "cat":
            return torch.cat([maps[i] for i in arguments[0]], 1)
        if kind == "gate":
            value, gate = maps[arguments[0]].chunk(2, 1)
            return value * gate.sigmoid()
        if kind == "squeeze-excite":
            y = maps[arguments[1]]
            return y * self.layers[arguments[0]](y.mean((2, 3), keepdim=True)).sigmoid()
        if kind == "pool":
            return F.max_pool2d(maps[arguments[0]], 3, 1, 1)
        if kind == "average":
            return F.avg_pool2d(maps[arguments[0]], 3, 1, 1)
        raise AssertionError(kind)
