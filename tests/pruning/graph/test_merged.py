"""Constants that no bias can take up: one channel that stays carries those of all others, exactly.

In every net `a` has dead filters with constants other than 0 behind them; `left` says how many must stay.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import IMAGE, TOKENS, Case, Net, check_case, conv, kill, linear, norm
from torch import Tensor, nn

from ffr_ext import compact

SIX = slice(0, 6)


def constants(layer: nn.Module, values: list[float], dim: int = 0) -> nn.Module:
    """The first filters are dead, and their biases the values."""
    kill(layer, slice(0, len(values)), dim=dim)
    with torch.no_grad():
        layer.bias[: len(values)] = torch.tensor(values)
    return layer


def stem(*values: float, out: int = 8, **kw: Any) -> nn.Module:
    return constants(nn.Conv2d(3, out, 3, **kw), list(values))


VALUES = (0.3, 0.9, -0.4, 0.5, 0.7, 0.2)

CASES = {
    "strided-dilated": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=stem(*VALUES), b=conv(8, 4, padding=2, stride=2, dilation=2)),
        IMAGE,
        {"a": 3},
        "whatever the padding and the stride",
    ),
    "even-kernel": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=stem(*VALUES), b=conv(8, 4, (2, 5), padding=(1, 0))),
        IMAGE,
        {"a": 3},
        "and the kernel, padded on one axis only",
    ),
    "relu-between": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=stem(*VALUES), b=conv(8, 4, padding=1)),
        IMAGE,
        {"a": 3},
        "the negative one is 0 and needs no carrier",
    ),
    "two-readers": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)) + m.c(m.a(x).relu()),
            a=stem(*VALUES),
            b=conv(8, 4, padding=1),
            c=conv(8, 4, 5, padding=2),
        ),
        IMAGE,
        {"a": 3},
        "one channel carries at both, with another ratio at each",
    ),
    "two-readers-of-one-sign-each": Case(
        lambda: Net(
            lambda m, x: m.b((-m.a(x)).relu()) + m.c(m.a(x).relu()),
            a=stem(*VALUES, -0.1),
            b=conv(8, 4, padding=1),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 3},
        "no constant is other than 0 at both readers: each needs one of its own",
    ),
    "one-of-both-readers-absorbs": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x))[..., 1:-1, 1:-1] + m.c(m.a(x)),
            a=stem(*VALUES),
            b=conv(8, 4, padding=1),
            c=conv(8, 4),
        ),
        IMAGE,
        {"a": 3},
        "the other one takes them into its bias",
    ),
    "residual-stream": Case(
        lambda: Net(
            lambda m, x: m.head(_stream(m, m.a(x))),
            a=stem(*VALUES),
            b=conv(8, 8, dead=SIX, padding=1),
            c=conv(8, 8, dead=SIX, bias=0.25, padding=1),
            head=conv(8, 2, padding=1),
        ),
        IMAGE,
        {"a": 3, "b": 3, "c": 3, "head.in_channels": 3},
        "one channel of the stream carries at all three readers, whose constants differ",
    ),
    "concatenation": Case(
        lambda: Net(
            lambda m, x: m.c(torch.cat([m.a(x).relu(), m.b(x).sigmoid()], 1)),
            a=stem(*VALUES[:2]),
            b=stem(*VALUES),
            c=conv(16, 4, padding=1),
        ),
        IMAGE,
        {"c.in_channels": 9},
        "one carrier for both parts",
    ),
    "groups": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)),
            a=constants(nn.Conv2d(3, 12, 3), [0.3] * 4 + [0.0] * 2 + [0.6] * 4),
            b=nn.Conv2d(12, 6, 3, padding=1, groups=2),
        ),
        IMAGE,
        {"a": 6},
        "each group has a carrier of its own: 2 live and 1, 2 live and 1",
    ),
    "transposed": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)), a=stem(*VALUES), b=nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1)
        ),
        IMAGE,
        {"a": 3},
        "its inputs are dimension 0 of the weight",
    ),
    "behind-f-pad": Case(
        lambda: Net(
            lambda m, x: m.b(F.pad(F.pad(m.a(x).relu(), (0, 1, 0, 1)), (1, 1, 0, 0))),
            a=stem(*VALUES),
            b=conv(8, 4, padding=1, stride=2),
        ),
        IMAGE,
        {"a": 3},
        "padded by hand as TensorFlow does it",
    ),
    "behind-a-padded-average": Case(
        lambda: Net(
            lambda m, x: (
                m.b(F.avg_pool2d(m.a(x).relu(), 3, 1, 1))
                + m.c(F.avg_pool2d(F.pad(m.a(x), (1, 1, 1, 1)), 3, 1))
            ),
            a=stem(*VALUES),
            b=conv(8, 4, 1),
            c=conv(8, 4, 1),
        ),
        IMAGE,
        {"a": 3},
        "an average with zeros around it has one shape for all constants",
    ),
    "behind-a-padded-maximum": Case(
        lambda: Net(
            lambda m, x: m.b(F.max_pool2d(F.pad(m.a(x), (1, 1, 1, 1)), 3, 1)),
            a=stem(*VALUES),
            b=conv(8, 4, 1),
        ),
        IMAGE,
        {"a": 8},
        "a maximum with zeros has not",
    ),
    "f-pad-with-another-value": Case(
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=0.1)), a=stem(*VALUES), b=conv(8, 4)),
        IMAGE,
        {"a": 8},
        "borders of 0.1 are not in proportion",
    ),
    "no-bias-to-make": Case(
        lambda: Net(
            lambda m, x: torch.matmul(m.a(x).relu(), m.w), a=constants(linear(6, 8), list(VALUES[:2]))
        ),
        TOKENS,
        {"a": 7},
        "a product by a parameter has no bias that could be added",
    ),
    "called-twice-with-the-same-constants": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x)) + m.c(m.b(x)),
            a=stem(*VALUES),
            b=stem(*VALUES),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 3, "b": 3},
        "one weight, the same ratios",
    ),
    "called-twice-with-other-constants": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x)) + m.c(m.b(x)),
            a=stem(0.3, 0.6, 0.5),
            b=stem(0.3, 0.7, 0.5),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 7, "b": 7},
        "the second ratio differs in the two calls: that channel stays",
    ),
    "weight-that-something-else-reads": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)) + m.b.weight.sum(), a=stem(*VALUES), b=conv(8, 4, padding=1)),
        IMAGE,
        {"a": 8},
        "its sum would change",
    ),
    "two-layers-with-one-weight": Case(
        lambda: Net(
            lambda m, x: (
                F.conv2d(m.a(x), m.b.weight, m.b.bias, padding=1)[..., 1:-1, 1:-1]
                + F.conv2d(m.a(x), m.b.weight, m.c.bias)
            ),
            a=stem(*VALUES),
            b=conv(8, 4, padding=1),
            c=conv(3, 4),
        ),
        IMAGE,
        {"a": 3},
        "what one of two biases cannot take goes into the weight of both",
    ),
    "silenced-carrier": Case(
        lambda: Net(
            lambda m, x: m.c(m.n(m.b(m.a(x).relu())).relu()),
            a=stem(*VALUES),
            b=conv(8, 8, padding=1),
            n=norm(8, slice(0, 8), 0.5),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"b": 1, "a": 1},
        "the filter of a carrier with gamma 0 is read by nobody, and needs no constants",
    ),
}


def _stream(m: nn.Module, x: Tensor) -> Tensor:
    x = x + m.b(x.relu())
    return x + m.c(x)


@pytest.mark.parametrize("name", CASES)
def test_exact_removal(name: str) -> None:
    case = CASES[name]
    if name == "no-bias-to-make":
        case = case._replace(make=lambda: _with_parameter(CASES[name].make(), 8, 4))
    check_case(case)


def _with_parameter(net: nn.Module, *shape: int) -> nn.Module:
    net.w = nn.Parameter(torch.randn(shape))
    return net


def test_the_largest_constant_carries() -> None:
    torch.manual_seed(0)
    model = CASES["strided-dilated"].make().eval()
    result = compact(model, torch.randn(IMAGE), measure=False)
    (merge,) = result.plan.merges["b.weight"]
    assert set(merge.onto) == {1}
    assert merge.factor == pytest.approx([v / 0.9 for v in VALUES if v != 0.9])


def test_a_tiny_constant_carries_none_that_is_far_larger() -> None:
    """It may be what rounding left of 0. A second compaction finds no more either."""
    model = Net(
        lambda m, x: m.b(m.a(x)) + m.c((-m.a(x) + 1.0).relu()),
        a=stem(1e-9, 3.0, 2.0),
        b=conv(8, 4, padding=1),
        c=conv(8, 4, padding=1),
    ).eval()
    x = torch.randn(IMAGE)
    result = compact(model, x, measure=False)
    assert result.model.a.out_channels == 7
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-5)
    assert compact(result.model, x, measure=False).plan.is_empty


def test_the_report_says_what_was_merged() -> None:
    report = compact(CASES["strided-dilated"].make().eval(), torch.randn(IMAGE), measure=False).report
    assert report.merged == 5
    assert "5 of 8 channels removed, 5 of them merged into a constant one that stays" in report.explain()
    assert "1 stay: constant 0.9 that conv2d in b cannot absorb" in report.explain()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_round_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = CASES["residual-stream"].make().eval().to(dtype)
    x = torch.randn(IMAGE, dtype=dtype)
    result = compact(model, x, measure=False)
    assert result.model.a.out_channels == 3
    exact = model.double()(x.double())
    error = (result.model.double()(x.double()) - exact).abs().max() / exact.abs().max()
    assert error < 4 * torch.finfo(dtype).eps
