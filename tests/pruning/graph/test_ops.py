"""What ops without weights, and norms, do to dead channels: one small net per op.

In every net `a` is the layer with dead filters; `left` says how many filters of which layers must be left.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import DEAD, IMAGE, TOKENS, Case, Net, check_case, conv, linear, norm
from torch import Tensor, nn

CASES = {
    "batch-norm-constant": Case(
        lambda: Net(lambda m, x: m.b(F.silu(m.n(m.a(x)))), a=conv(3, 8, dead=DEAD), n=norm(8), b=conv(8, 4)),
        IMAGE,
        {"a": 5},
        "beta - gamma mean / std, absorbed",
    ),
    "batch-norm-constant-behind-padding": Case(
        lambda: Net(
            lambda m, x: m.b(F.silu(m.n(m.a(x)))), a=conv(3, 8, dead=DEAD), n=norm(8), b=conv(8, 4, padding=1)
        ),
        IMAGE,
        {"a": 6},
        "a dead filter, but not a dead channel: one carries the constants of all",
    ),
    "gamma-zero": Case(
        lambda: Net(
            lambda m, x: m.b(m.n(m.a(x)).relu()), a=conv(3, 8), n=norm(8, DEAD, -1.0), b=conv(8, 4, padding=1)
        ),
        IMAGE,
        {"a": 5},
        "the filter is alive, its channel is not",
    ),
    "residual-both-dead": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x) + m.b(x)),
            a=conv(3, 8, dead=[0, 1, 2]),
            b=conv(3, 8, dead=[1, 2, 3]),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 6, "b": 6},
        "the intersection",
    ),
    "every-second-channel": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x)[:, ::2].relu() * m.a(x)[:, 1::2]),
            a=conv(3, 8, dead=DEAD),
            c=conv(4, 4, padding=1),
        ),
        IMAGE,
        {"a": 4, "c.in_channels": 2},
        "pairs with a dead channel, 0, 1 and 2, 3: their product is 0",
    ),
    "the-first-of-every-three": Case(
        lambda: Net(lambda m, x: m.c(m.a(x)[:, ::3]), a=conv(3, 8, dead=DEAD), c=conv(3, 4)),
        IMAGE,
        {"a": 8},
        "8 channels are no steps of 3",
    ),
    "largest-channel": Case(
        lambda: Net(lambda m, x: m.a(x).max(1).values.sum() + m.b(x), a=conv(3, 8, dead=DEAD), b=conv(3, 2)),
        IMAGE,
        {"a": 8},
        "0 can be the largest",
    ),
    "larger-of-two": Case(
        lambda: Net(
            lambda m, x: m.c(torch.max(m.a(x), m.b(x))),
            a=conv(3, 8, dead=DEAD),
            b=conv(3, 8, dead=DEAD),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 5, "b": 5},
        "by channel",
    ),
    "where-with-a-number": Case(
        lambda: Net(
            lambda m, x: m.c(torch.where(m.b(x) > 0, m.a(x).relu(), 0.0)),
            a=conv(3, 8, dead=DEAD),
            b=conv(3, 8),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 5, "b": 5},
        "0, whatever the condition",
    ),
    "where-with-another-number": Case(
        lambda: Net(
            lambda m, x: m.c(torch.where(m.b(x) > 0, 0.5, m.a(x).relu())),
            a=conv(3, 8, dead=DEAD),
            b=conv(3, 8),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 8, "b": 8},
        "one of two constants",
    ),
    "where-of-a-constant-condition": Case(
        lambda: Net(
            lambda m, x: m.c(torch.where(m.a(x) > 0.1, 1.0, 0.0)),
            a=conv(3, 8, dead=DEAD),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 5},
        "the condition is a constant",
    ),
    "residual-in-place": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x).add_(m.b(x)).relu_()),
            a=conv(3, 8, dead=[0, 1, 2]),
            b=conv(3, 8, dead=[1, 2, 3]),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 6, "b": 6},
        "the same, written in place",
    ),
    "in-place-seen-through-a-view": Case(
        lambda: Net(_writes_through_a_view, a=conv(3, 8, dead=DEAD), b=conv(8, 4)),
        IMAGE,
        {"a": 8},
        "a channel that was 0 before it was written to",
    ),
    "difference-and-product": Case(
        lambda: Net(
            lambda m, x: m.c((m.a(x) - 2 * m.b(x)) * m.d(x).sigmoid()),
            a=conv(3, 8, dead=DEAD),
            b=conv(3, 8, dead=DEAD),
            c=conv(8, 4, padding=1),
            d=conv(3, 8),
        ),
        IMAGE,
        {"a": 5, "d": 5},
        "0 times anything",
    ),
    "division": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x) / (1 + m.b(x).square())),
            a=conv(3, 8, dead=DEAD, bias=0.5),
            b=conv(3, 8, dead=DEAD, bias=1.0),
            c=conv(8, 4),
        ),
        IMAGE,
        {"a": 5, "b": 5},
        "0.5 / 2",
    ),
    "squeeze-excite": Case(
        lambda: Net(
            lambda m, x: _squeeze_excite(m, m.a(x).relu()),
            a=conv(3, 8, dead=DEAD),
            f=conv(8, 4, 1, dead=[0]),
            g=conv(4, 8, 1),
            c=conv(8, 2, padding=1),
        ),
        IMAGE,
        {"a": 5, "g": 5, "f": 3},
        "the gate of a dead channel goes with it",
    ),
    "concat": Case(
        lambda: Net(
            lambda m, x: m.c(torch.cat([m.a(x), m.b(x), x[:, :, 1:-1, 1:-1]], 1)),
            a=conv(3, 8, dead=DEAD),
            b=conv(3, 6, dead=[5]),
            c=conv(17, 4, padding=1),
        ),
        IMAGE,
        {"a": 5, "b": 5},
        "channels keep their places, also beside the input",
    ),
    "batch-norm-over-concat": Case(
        lambda: Net(
            lambda m, x: m.c(m.n(torch.cat([m.a(x), m.b(x)], 1)).relu()),
            a=conv(3, 8, dead=DEAD),
            b=conv(3, 6),
            n=norm(14, DEAD, -1),
            c=conv(14, 4, padding=1),
        ),
        IMAGE,
        {"a": 5, "b": 6},
        "as in DenseNet",
    ),
    "chunk": Case(
        lambda: Net(_gate_by_chunk, a=conv(3, 8, dead=[0, 4, 5]), c=conv(4, 2, padding=1)),
        IMAGE,
        {"a": 6},
        "halves stay halves: channel 0 and its gate 4 go, 5 stays with 1",
    ),
    "glu": Case(
        lambda: Net(lambda m, x: m.c(F.glu(m.a(x), 1)), a=conv(3, 8, dead=[0, 4]), c=conv(4, 2, padding=1)),
        IMAGE,
        {"a": 6},
        "chunk by another name",
    ),
    "chunk-with-one-half-unread": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).chunk(2, 1)[0]), a=conv(3, 8, dead=[0]), b=conv(4, 2)),
        IMAGE,
        {"a": 6},
        "the second half is not read, but keeps as many channels as the first",
    ),
    "halves-with-one-reader": Case(
        lambda: Net(
            lambda m, x: sum(m.b(p) for p in m.a(x).chunk(2, 1)), a=conv(3, 8, dead=[0, 1, 5]), b=conv(4, 2)
        ),
        IMAGE,
        {"a": 6},
        "b has one column for channels 1 and 5",
    ),
    "slice": Case(
        lambda: Net(lambda m, x: m.c(m.a(x)[:, 2:]), a=conv(3, 8, dead=DEAD), c=conv(6, 2)),
        IMAGE,
        {"a": 8},
        "the 2 is written in the forward code",
    ),
    "max-pool": Case(
        lambda: Net(
            lambda m, x: m.c(F.max_pool2d(m.a(x), 3, 2, 1)),
            a=conv(3, 8, dead=DEAD, bias=-0.5),
            c=conv(8, 4, 1),
        ),
        IMAGE,
        {"a": 5},
        "its padding is -inf, so a constant stays",
    ),
    "avg-pool-padded-zero": Case(
        lambda: Net(
            lambda m, x: m.c(F.avg_pool2d(m.a(x), 3, 2, 1)), a=conv(3, 8, dead=DEAD), c=conv(8, 4, 1)
        ),
        IMAGE,
        {"a": 5},
        "0 averaged with padding",
    ),
    "avg-pool-padded-constant": Case(
        lambda: Net(
            lambda m, x: m.c(F.avg_pool2d(m.a(x), 3, 2, 1)),
            a=conv(3, 8, dead=DEAD, bias=0.5),
            c=conv(8, 4, 1),
        ),
        IMAGE,
        {"a": 6},
        "the padding counts: smaller at the border, for all constants alike",
    ),
    "avg-pool-not-counting": Case(
        lambda: Net(
            lambda m, x: m.c(F.avg_pool2d(m.a(x), 3, 2, 1, count_include_pad=False)),
            a=conv(3, 8, dead=DEAD, bias=0.5),
            c=conv(8, 4, 1),
        ),
        IMAGE,
        {"a": 5},
        "the padding does not count",
    ),
    "interpolate": Case(
        lambda: Net(
            lambda m, x: m.c(F.interpolate(m.a(x), scale_factor=2, mode="bilinear")),
            a=conv(3, 8, dead=DEAD, bias=0.5),
            c=conv(8, 4),
        ),
        IMAGE,
        {"a": 5},
        "weights that sum to 1",
    ),
    "reshape-and-permute": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x).flatten(2).transpose(1, 2)),
            a=conv(3, 8, dead=DEAD, bias=0.5),
            c=linear(8, 4),
        ),
        IMAGE,
        {"a": 5},
        "channels become the features of tokens",
    ),
    "channel-shuffle": Case(
        lambda: Net(_channel_shuffle, a=conv(3, 8, dead=DEAD), c=conv(8, 4)),
        IMAGE,
        {"a": 8},
        "a view over two dimensions fixes their sizes",
    ),
    "mean": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).mean((2, 3))), a=conv(3, 8, dead=DEAD, bias=0.5), c=linear(8, 4)),
        IMAGE,
        {"a": 5},
        "the mean of a constant",
    ),
    "mean-over-channels": Case(
        lambda: Net(lambda m, x: m.a(x).mean(1), a=conv(3, 8, dead=DEAD)),
        IMAGE,
        {"a": 8},
        "the number of channels counts",
    ),
    "softmax-over-channels": Case(
        lambda: Net(lambda m, x: m.c(m.a(x).softmax(1)), a=conv(3, 8, dead=DEAD), c=conv(8, 4)),
        IMAGE,
        {"a": 8},
        "exp(0) is in the sum",
    ),
    "dropout": Case(
        lambda: Net(
            lambda m, x: m.c(F.dropout2d(m.a(x), 0.5, m.training)), a=conv(3, 8, dead=DEAD), c=conv(8, 4)
        ),
        IMAGE,
        {"a": 5},
        "nothing in eval mode",
    ),
    "group-norm": Case(
        lambda: Net(
            lambda m, x: m.c(m.n(m.a(x))),
            a=conv(3, 8, dead=slice(0, 4)),
            n=_group_norm(4, 8, slice(0, 3)),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 6, "n.num_groups": 3},
        "only a whole group leaves without changing statistics",
    ),
    "instance-norm": Case(
        lambda: Net(
            lambda m, x: m.c(m.n(m.a(x))),
            a=conv(3, 8, dead=DEAD),
            n=nn.InstanceNorm2d(8),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 5, "n.num_features": 5},
        "a constant minus its mean is 0",
    ),
    "layer-norm": Case(
        lambda: Net(lambda m, x: m.c(m.n(m.a(x))), a=linear(6, 8, DEAD), n=nn.LayerNorm(8), c=linear(8, 4)),
        TOKENS,
        {"a": 8},
        "all channels are in the statistics",
    ),
    "prelu": Case(
        lambda: Net(
            lambda m, x: m.c(m.n(m.a(x))), a=conv(3, 8, dead=DEAD, bias=-0.5), n=nn.PReLU(8), c=conv(8, 4)
        ),
        IMAGE,
        {"a": 5, "n.num_parameters": 5},
        "a slope per channel",
    ),
    "layer-scale": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x) * m.s.weight[:, None, None]),
            a=conv(3, 8),
            s=_vector(8, DEAD),
            c=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"a": 5},
        "a parameter that is 0",
    ),
}


def _writes_through_a_view(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    y.view(-1).add_(1.0)
    return m.b(y)


def _squeeze_excite(m: nn.Module, y: Tensor) -> Tensor:
    return m.c(y * m.g(m.f(F.adaptive_avg_pool2d(y, 1)).relu()).sigmoid())


def _gate_by_chunk(m: nn.Module, x: Tensor) -> Tensor:
    value, gate = m.a(x).chunk(2, 1)
    return m.c(value * gate.sigmoid())


def _channel_shuffle(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.c(y.view(y.shape[0], 2, 4, *y.shape[2:]).transpose(1, 2).flatten(1, 2))


def _group_norm(groups: int, channels: int, dead: slice) -> nn.GroupNorm:
    layer = nn.GroupNorm(groups, channels)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        layer.weight[dead] = 0
    return layer


def _vector(size: int, dead: slice) -> nn.Module:
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(size))
    with torch.no_grad():
        holder.weight[dead] = 0
    return holder


@pytest.mark.parametrize("name", CASES)
def test_exact_removal(name: str) -> None:
    check_case(CASES[name])
