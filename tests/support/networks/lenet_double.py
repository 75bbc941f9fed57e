"""A small LeNet in float64, two images and their labels."""

from __future__ import annotations

import torch
from torch import nn

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)
Y = torch.tensor([0, 1])


def lenet() -> nn.Module:
    """Two convolutions and two linear layers behind a flatten, with scales that are not 1."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 4),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[1].weight.uniform_(-1, 1)
    return model
