"""Regions under autocast or another gradient mode are walked like the code around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruning_nets import IMAGE, Net, conv
from torch import Tensor, nn

from ffr_ext import compact

Region = Callable[[nn.Module, Tensor], Tensor]


def autocast_off(m: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.b(h.float())


def autocast_bf16(m: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.b(h).float()


def enable_grad(m: Any, h: Tensor) -> Tensor:
    with torch.enable_grad():
        return m.b(h)


def no_grad(m: Any, h: Tensor) -> Tensor:
    with torch.no_grad():
        return m.b(h)


def nested(m: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        h = h.float() * 2
        with torch.enable_grad():
            h = m.b(h)
        return h + 0.5


def several_results(m: Any, h: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        a, b = m.b(h), m.b(h).sigmoid()
    return a * b


def within_a_loop(m: Any, h: Tensor) -> Tensor:
    total = torch.zeros(())
    for factor in (1.0, 2.0):
        with torch.autocast("cpu", enabled=False):
            total = total + m.b(h.float()) * factor
    return total


REGIONS: list[Region] = [
    autocast_off, autocast_bf16, enable_grad, no_grad, nested, several_results, within_a_loop
]  # fmt: skip


@pytest.mark.parametrize("bias", [0.0, 0.5], ids=["zero", "constant"])
@pytest.mark.parametrize("region", REGIONS, ids=lambda r: r.__name__)
def test_a_region_hides_no_channels(region: Region, bias: float) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.c(region(m, m.a(x).relu()).relu()),
        a=conv(3, 16, dead=slice(0, 8), bias=bias),
        b=conv(16, 8, 1, dead=slice(0, 4)),
        c=conv(8, 4, 1),
    ).eval()
    result = compact(model, torch.randn(IMAGE), measure=False)
    assert result.report.unknown_ops == {}
    assert result.report.parameters[0] == 620
    assert (result.model.a.out_channels, result.model.b.out_channels) == (8, 4)
    x = torch.randn(IMAGE)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if region is autocast_bf16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(result.model(x), model(x), **tolerance)


def test_a_dead_block_with_a_region_is_replaced() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = conv(8, 8, 3, slice(0, 8), padding=1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return x + self.inner(x.float())

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Block(), nn.Conv2d(8, 2, 3)).eval()
    result = compact(model, torch.randn(IMAGE), measure=False)
    assert isinstance(result.model[1], nn.Identity)


def test_layers_that_the_forward_casts_to_what_they_are_do_not_stop_the_trace() -> None:
    """Routers of experts do it. A trace cannot exchange parameters; where nothing changes there is nothing to do."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        first = model.a.to(x.device, x.dtype).to(memory_format=torch.channels_last)
        return model.b.to(torch.float32)(first(x))

    to = nn.Module.to
    model = Net(forward, a=conv(3, 8, dead=slice(0, 3)), b=conv(8, 4)).eval()
    result = compact(model, torch.randn(IMAGE), measure=False)
    assert result.model.a.out_channels == 5
    assert nn.Module.to is to
