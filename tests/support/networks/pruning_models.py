"""Small models with dead filters, and how they are compared."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A stem, two residual blocks and a head: enough for couplings, dead branches and every kind of
    constant."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList([Block(width, hidden), Block(width, hidden)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


def settled(model: nn.Module) -> nn.Module:
    """Norms with statistics and scales of their own, as after training; in eval mode."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model.eval()


def dead(model: Residual | None = None, filters: int = 5) -> Residual:
    """Dead hidden filters of both blocks, with gamma and beta 0 or below."""
    model = settled(Residual() if model is None else model)
    with torch.no_grad():
        for block in model.blocks:
            block.conv1.weight[:filters] = 0
            block.bn1.weight[:filters] = 0
            block.bn1.bias[:filters] = -0.1
    return model.eval()


X = (2, 3, 8, 8)


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def difference(a: nn.Module, b: nn.Module, x: Tensor | None = None) -> float:
    x = torch.randn(X) if x is None else x
    with torch.no_grad():
        return float((a(x) - b(x)).abs().max())


def absorbing() -> nn.Sequential:
    """Constants that go into a bias that exists, into one that does not, and a grouped convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    with torch.no_grad():
        model[0].weight[[0, 5]] = 0
        model[0].bias[[0, 5]] = 0.25
        model[2].weight[[1, 7]] = 0
    return model.eval()


def wrapped() -> nn.Module:
    """A model whose own names begin like those of a wrapper."""
    model = nn.Module()
    model.module = dead()
    return model
