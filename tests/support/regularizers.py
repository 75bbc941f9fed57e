"""A penalty of weights for the tests of schedules and trainers, with every part of the protocol in use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffr_ext.regularizers import BaseRegularizer


class Ridge(BaseRegularizer):
    """weight / 2 * sum of squares, whose gradient is weight * w; `step` moves what is small to 0."""

    def __init__(self, model: nn.Module, weight: float = 0.5, threshold: float = 0.0) -> None:
        super().__init__(model)
        self.weight, self.threshold = weight, threshold
        self.added = self.stepped = 0
        self.open = False

    def loss(self) -> Tensor:
        total = torch.stack([p.square().sum() for p in self.parameters()]).sum()
        return self.scale * self.weight / 2 * total

    def add_gradients_(self) -> None:
        self.added += 1
        for p in self.parameters():
            assert p.grad is not None
            p.grad.add_(p.detach(), alpha=self.scale * self.weight)

    def before_forward(self) -> None:
        assert not self.open
        self.open = True

    def after_backward(self) -> None:
        self.open = False

    def step(self) -> None:
        assert not self.open
        self.stepped += 1
        with torch.no_grad():
            for p in self.parameters():
                p[p.abs() <= self.scale * self.threshold] = 0

    def terms(self) -> dict[str, Tensor]:
        return {name: p.detach().norm() for name, p in self.model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "weight": self.weight}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.weight = state["weight"]
