"""Constants that are those of the example's sizes stay: the result holds for inputs of other sizes too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import Net
from torch import Tensor, nn

from ffr_ext import compact

IMAGES = torch.randn(2, 3, 8, 8)


def dead_constants(pool: Callable[[Tensor], Tensor]) -> nn.Module:
    """Four of eight channels are 0.7 behind the norm."""
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.head(pool(m.norm(m.conv(x)))),
        conv=nn.Conv2d(3, 8, 1),
        norm=nn.BatchNorm2d(8),
        head=nn.Linear(8, 4),
    )
    with torch.no_grad():
        net.norm.weight[:4] = 0
        net.norm.bias[:4] = 0.7
    return net.eval()


def check(model: nn.Module, result: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pool",
    [
        lambda h: h.sum((2, 3)),
        lambda h: h.mean((2, 3)) * h.shape[2] ** -0.5,
        lambda h: h.mean((2, 3)) + h.shape[3],
        lambda h: h.mean((2, 3)) * h.shape[0],
        lambda h: h.mean((2, 3)) + torch.arange(h.shape[2]).float().sum(),
        lambda h: F.lp_pool2d(h, 2, h.shape[2:]).flatten(1),
    ],
    ids=["sum", "times a size", "plus a size", "times the batch", "positions", "lp pool"],
)
def test_constants_of_one_size_are_not_absorbed(pool: Callable[[Tensor], Tensor]) -> None:
    model = dead_constants(pool)
    result = compact(model, IMAGES, measure=False)
    assert result.model.conv.out_channels == 8
    assert any("for inputs of shapes [(1, 3, 4, 4)], the outputs differ" in n for n in result.report.notes)
    check(model, result.model, [(2, 3, 8, 8), (3, 3, 12, 10), (1, 3, 5, 5)])


@pytest.mark.parametrize(
    "pool",
    [
        lambda h: h.mean((2, 3)),
        lambda h: h.sum((2, 3)) / (h.shape[2] * h.shape[3]),
        lambda h: F.avg_pool2d(h, h.shape[2:]).flatten(1),
        lambda h: h.amax((2, 3)),
    ],
    ids=["mean", "sum by size", "average pool", "max"],
)
def test_constants_of_every_size_are(pool: Callable[[Tensor], Tensor]) -> None:
    model = dead_constants(pool)
    result = compact(model, IMAGES, measure=False)
    assert result.model.conv.out_channels == 4
    check(model, result.model, [(2, 3, 8, 8), (3, 3, 12, 10), (1, 3, 5, 5)])


def test_zeros_leave_whatever_they_are_summed_over() -> None:
    model = dead_constants(lambda h: h.sum((2, 3)))
    model.get_parameter("norm.bias").data[:4] = 0
    result = compact(model, IMAGES, measure=False)
    assert result.model.conv.out_channels == 4
    check(model, result.model, [(2, 3, 8, 8), (3, 3, 12, 10)])


def test_a_model_of_one_size_absorbs_what_it_is_there() -> None:
    model = Net(
        lambda m, x: m.head((m.norm(m.conv(x)) * x.shape[2]).flatten(1)),
        conv=nn.Conv2d(3, 8, 1),
        norm=nn.BatchNorm2d(8),
        head=nn.Linear(8 * 64, 4),
    ).eval()
    with torch.no_grad():
        model.norm.weight[:4] = 0
        model.norm.bias[:4] = 0.7
    result = compact(model, IMAGES[:1], measure=False)
    assert result.model.conv.out_channels == 4
    check(model, result.model, [(2, 3, 8, 8)])


class Grid(nn.Module):
    """Keeps what it has made for the size that it saw last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.seen != tuple(x.shape):
            self.seen = tuple(x.shape)
        result: Tensor = self.head(self.norm(self.conv(x)))
        return result


def test_what_the_model_keeps_for_a_size_is_that_of_the_example() -> None:
    model = Grid().eval()
    with torch.no_grad():
        model.norm.weight[:4] = 0
        model.norm.bias[:4] = 0.7
    result = compact(model, IMAGES, measure=False)
    assert result.model.get_parameter("norm.weight").shape == (4,)
    assert model.seen == tuple(IMAGES.shape)
    assert result.model.seen == tuple(IMAGES.shape)
