"""Small nets for the tests of `ffr_ext.explain`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffr_ext.explain import backward_rule

# Every way to write a ReLU. The in-place ones return their input.
SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU(inplace)": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu(inplace)": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "x.relu()": lambda x: x.relu(),
    "x.relu_()": lambda x: x.relu_(),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "x.clamp(min=0)": lambda x: x.clamp(min=0),
    "x.clamp_(0)": lambda x: x.clamp_(0),
    "torch.clamp_min": lambda x: torch.clamp_min(x, 0),
    "F.threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "torch.ops.aten.relu": lambda x: torch.ops.aten.relu.default(x),
}


class Residual(nn.Module):
    """Two convolutions and a shortcut; the ReLU is handed in, and its return value is ignored where it is in place."""

    def __init__(self, relu: Callable[[Tensor], Tensor], stride: int = 1) -> None:
        super().__init__()
        self.relu = relu if isinstance(relu, nn.Module) else _Call(relu)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 6, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.short = nn.Conv2d(6, 6, 1, stride) if stride > 1 else nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        inner = self.norm1(self.conv1(x))
        inner = self.relu(inner)
        x = self.relu(self.conv2(inner) + self.short(x))
        return self.head(x.mean((2, 3)))


class _Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def conv_net(classes: int = 3, stride: int = 2) -> nn.Sequential:
    """conv, norm, in-place ReLU twice, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    ).eval()  # fmt: skip


def with_statistics(model: nn.Module) -> nn.Module:
    """Batch norms as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, 0.1, 0.5)
    return model.eval()


def loader(
    images: int = 60, classes: int = 3, size: int = 12, batch: int = 20
) -> list[tuple[Tensor, Tensor]]:
    """Images of which class j is bright in colour j; the same ones at every call."""
    labels = torch.arange(images) % classes
    x = torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(0)) * 0.4
    x[torch.arange(images), labels % 3] += 0.6
    return [(x[i : i + batch], labels[i : i + batch]) for i in range(0, images, batch)]


def heat(model: nn.Module, x: Tensor, *rule: str, **options: str) -> tuple[Tensor, Tensor]:
    """The outputs under a rule, and what the signal of output 1 becomes at the input."""
    x = x.clone().requires_grad_()
    with backward_rule(*rule, **options):
        y = model(x)
    return y.detach(), torch.autograd.grad(y[:, 1].sum(), x)[0]
