"""Rows that are taken, changed and put back, and choices among channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_nets import same_outputs
from torch import Tensor, nn

from ffr_ext import compact


class RowsBack(nn.Module):
    """Rows taken, changed and put back, in a net without a fixed width."""

    def __init__(self, put: Any) -> None:
        super().__init__()
        self.a, self.b, self.c, self.put = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), put
        with torch.no_grad():
            for layer in (self.a, self.b):
                layer.weight[:3] = 0
                layer.bias[:3] = torch.tensor([0.0, 0.5, 0.5])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.c(self.put(h, self.b, x.sum(-1) > 0))


def masked(h: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
    out = h.clone()
    out[mask] = layer(h[mask]).relu()
    return out


def copied(h: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
    (rows,) = torch.where(mask)
    return h.index_copy(0, rows, layer(h[rows]).relu())


def added(h: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
    (rows,) = torch.where(mask)
    return h.index_add(0, rows, layer(h[rows]).relu())


def zeroed(h: Tensor, layer: nn.Module, mask: Tensor) -> Tensor:
    out = layer(h).relu()
    out[mask] = 0.0
    return out


@pytest.mark.parametrize(
    ("put", "left"),
    [
        (masked, 5),  # 0, and the constants that are the same in both go into the bias behind
        (copied, 5),
        (added, 7),  # rows that something is added to are 0.5 more than the others
        (zeroed, 7),
    ],
)
def test_rows_put_back_keep_a_constant_only_where_it_is_the_same(put: Any, left: int) -> None:
    torch.manual_seed(0)
    model = RowsBack(put).eval()
    small = compact(model, torch.randn(9, 4), measure=False).model
    assert small.b.out_features == small.c.in_features == left
    same_outputs(small, model, (20, 4))


def test_a_choice_among_channels_keeps_them() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 8)
            with torch.no_grad():
                self.a.weight[:3] = self.a.bias[:3] = 0

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return h.topk(2, -1)[0] + h.argmax(-1, keepdim=True) + h.sort(-1)[0][:, :2] + h.argsort(-1)[:, :2]

    report = compact(Choosing().eval(), torch.randn(3, 4), measure=False).report
    assert report.channels == (8, 8)
    assert "chosen from by topk" in report.explain()
    assert not report.unknown_ops
