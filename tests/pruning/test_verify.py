"""The check of a result: rounding is told from a mistake in every dtype, whatever the forward names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import Net, conv, linear
from torch import Tensor, nn

from ffr_ext import compact

X = (2, 3, 8, 8)
HALF = [torch.bfloat16, torch.float16]

# How a forward of a half-precision model names dtypes on its way from features to the head.
CASTS: dict[str, Callable[[Any, Tensor, torch.dtype], Tensor]] = {
    "to": lambda n, h, d: n.head(h.mean((2, 3)).to(torch.float32).to(d)),
    "float and half": lambda n, h, d: n.head(_back(h.mean((2, 3)).float(), d)),
    "dtype=": lambda n, h, d: n.head(
        h.mean((2, 3), dtype=torch.float32).softmax(1, dtype=torch.float32).to(dtype=d)
    ),
    "type": lambda n, h, d: n.head(h.mean((2, 3)).float().type(d)),
    "factory": lambda n, h, d: n.head(h.mean((2, 3)) * torch.ones((), dtype=d)),
    "autocast-like": lambda n, h, d: F.linear(
        h.mean((2, 3)).float().to(d), n.head.weight.to(d), n.head.bias.to(d)
    ),
}


def _back(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.half() if dtype == torch.float16 else tensor.bfloat16()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("cast", CASTS)
def test_a_forward_may_name_a_dtype(cast: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda n, x: CASTS[cast](n, n.conv(x).relu(), dtype),
        conv=conv(3, 16, 3, slice(0, 8)),
        head=linear(16, 4),
    )
    model = model.to(dtype).eval()
    x = torch.randn(X, dtype=dtype)
    result = compact(model, x, measure=False)
    # A softmax over the channels sees the dead ones.
    assert result.model.conv.out_channels == (16 if cast == "dtype=" else 8)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.report.notes == []


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_mistake_in_half_precision_is_found_also_where_dtypes_are_named(dtype: torch.dtype) -> None:
    """The forward scales by a stored width, by less than half precision rounds the outputs to."""
    model = Net(
        lambda n, x: n.head(
            (n.conv(x).relu().mean((2, 3)).float() * (1 + n.conv.out_channels * 1e-2)).to(dtype)
        ),
        conv=conv(3, 16, 3, slice(0, 8)),
        head=linear(16, 4),
    )
    result = compact(model.to(dtype).eval(), torch.randn(X, dtype=dtype), measure=False)
    assert result.model.conv.out_channels == 16
    assert any("in float64" in note for note in result.report.notes)


class HalfOnly(torch.autograd.Function):
    """An op of one dtype, as a kernel of one's own is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise TypeError("this kernel takes bfloat16")
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_a_model_that_does_not_run_in_float64_is_compared_in_its_own_dtype() -> None:
    model = Net(
        lambda n, x: HalfOnly.apply(n.head(n.conv(x).relu().mean((2, 3)))),
        conv=conv(3, 16, 3, slice(0, 8)),
        head=linear(16, 4),
    )
    result = compact(model.bfloat16().eval(), torch.randn(X, dtype=torch.bfloat16), measure=False)
    assert result.model.conv.out_channels == 8


def test_what_does_not_run_in_float64_is_not_blamed_on_the_copy() -> None:
    calls = []

    def wrong_after_a_cut(n: Any, x: Tensor) -> Tensor:
        calls.append(1)
        return HalfOnly.apply(n.head(n.conv(x).relu().mean((2, 3)))) * n.conv.out_channels

    model = Net(wrong_after_a_cut, conv=conv(3, 16, 3, slice(0, 8)), head=linear(16, 4))
    result = compact(model.bfloat16().eval(), torch.randn(X, dtype=torch.bfloat16), measure=False)
    assert result.model.conv.out_channels == 16
    (note,) = result.report.notes
    assert "does not run in float64, which would tell rounding from a mistake: TypeError: this kernel" in note


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_bias_that_is_made_has_the_models_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(
        conv(3, 8, 1, slice(0, 3), 0.5), nn.Mish(), nn.Conv2d(8, 4, 1, bias=False), nn.Softplus()
    )
    result = compact(model.to(dtype).eval(), torch.randn(X, dtype=dtype), measure=False)
    assert result.model[0].out_channels == 5
    assert result.model[2].bias.dtype == dtype
    result.model(torch.randn(X, dtype=dtype))


# What turns scores that are equal up to rounding into something else.
DECIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda s: s.topk(50).indices.to(s.dtype),
    "argsort": lambda s: s.argsort(1).to(s.dtype),
    "argmax": lambda s: s.argmax(1).to(s.dtype),
    "comparison": lambda s: (s > s.mean(1, keepdim=True)).to(s.dtype),
}


@pytest.mark.parametrize("decides", DECIDES)
def test_a_difference_that_is_rounding_is_explained(decides: str) -> None:
    """A flat image: in float32 the scores tie up to rounding, and another order of sums orders them otherwise."""
    for seed in range(40):
        torch.manual_seed(seed)
        model = Net(
            lambda n, x: DECIDES[decides](n.b(n.a(x).relu()).flatten(1)),
            a=conv(3, 64, 1, slice(0, None, 2), 0.37),  # constants that the next layer adds in another order
            b=conv(64, 1, 1),
        ).eval()
        x = torch.randn(1, 3, 1, 1) + 1e-7 * torch.randn(1, 3, 16, 16)
        report = compact(model, x, measure=False).report
        if report.parameters[1] < report.parameters[0] and report.max_error > 0.1:
            (note,) = report.notes
            assert f"in float32 the outputs differ by {report.max_error:.3g}, in float64 by" in note
            assert "rounding decides otherwise" in note
            assert note in str(report)
            return
        assert report.max_error > 1e-3 or report.notes == []
    pytest.fail("no seed swaps a tie")


def test_a_small_difference_has_no_remark() -> None:
    model = nn.Sequential(conv(3, 8, 1, slice(0, 3)), nn.ReLU(), conv(8, 2, 1)).eval()
    assert compact(model, torch.randn(X), measure=False).report.notes == []
