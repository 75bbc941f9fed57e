"""Networks for the tests of structured outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffr_ext.structured import StructuredOutput

X, Y = (5, 6), (8, 7)


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """6-5-4-3-7; both ends have an activation in front and behind."""
    return nn.Sequential(
        nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 7),
        nn.Tanh(),
    ).to(dtype)  # fmt: skip


def convolutional() -> nn.Sequential:
    """Images (B, 2, 9, 9) to images (B, 2, 8, 8), through a code of 12 numbers."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Conv2d(4, 3, 3), nn.Tanh(),
        nn.Flatten(), nn.Linear(27, 12), nn.Sigmoid(),
        nn.Unflatten(1, (3, 2, 2)), nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1), nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 4, stride=2, padding=1), nn.Sigmoid(),
    ).double()  # fmt: skip


class Residual(nn.Module):
    """A block that adds what it computes to what it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.linear(x)
        return result


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(X, dtype=torch.float64), torch.rand(Y, dtype=torch.float64) * 2 - 1


def both(model: nn.Sequential, **options: Any) -> StructuredOutput:
    given = {"first": model[:4], "last": model[5:], "input": 1.0, "output": 1.0, "corruption": 0.0, **options}
    return StructuredOutput(model, **given)
