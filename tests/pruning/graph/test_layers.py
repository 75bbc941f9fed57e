"""Dead channels in front of, between and behind the layers that mix channels: convolutions, linear layers.

In every net `a` is the layer with dead filters; `left` says how many filters of which layers must be left.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import DEAD, IMAGE, TOKENS, Case, Net, check_case, conv, kill, linear, norm
from torch import nn

CASES = {
    "zero-behind-padding": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8, dead=DEAD), b=conv(8, 4, padding=1)),
        IMAGE,
        {"a": 5},
        "0 is 0 at the border too",
    ),
    "constant-without-padding": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8, dead=DEAD, bias=0.7), b=conv(8, 4, bias=False)
        ),
        IMAGE,
        {"a": 5},
        "the constant becomes the bias of b, which had none",
    ),
    "constant-behind-padding": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8, dead=DEAD, bias=0.7), b=conv(8, 4, padding=1)
        ),
        IMAGE,
        {"a": 6},
        "a constant is no bias at a zero-padded border, but one carries all three",
    ),
    "negative-constant-behind-relu": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8, dead=DEAD, bias=-0.7), b=conv(8, 4, padding=1)
        ),
        IMAGE,
        {"a": 5},
        "the activation makes it 0",
    ),
    "reflect-padding": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)),
            a=conv(3, 8, dead=DEAD, bias=0.7),
            b=conv(8, 4, padding=1, padding_mode="reflect"),
        ),
        IMAGE,
        {"a": 5},
        "a constant stays one under reflection",
    ),
    "same-padding": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)), a=conv(3, 8, dead=DEAD, bias=0.7), b=conv(8, 4, padding="same")
        ),
        IMAGE,
        {"a": 6},
        "padded by name",
    ),
    "f-pad-with-the-constant": Case(
        lambda: Net(
            lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1), value=0.7)),
            a=conv(3, 8, dead=DEAD, bias=0.7),
            b=conv(8, 4),
        ),
        IMAGE,
        {"a": 8},
        "float32 0.7 is not the padding's 0.7",
    ),
    "f-pad-with-zero": Case(
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1, 1, 1))), a=conv(3, 8, dead=DEAD), b=conv(8, 4)),
        IMAGE,
        {"a": 5},
        "a border of 0 around 0",
    ),
    "nobody-reads-it": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).relu()), a=conv(3, 8), b=kill(conv(8, 4, padding=1), DEAD, dim=1)
        ),
        IMAGE,
        {"a": 5},
        "live filters whose readers have zero columns",
    ),
    "only-dead-filters-read-it": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
            a=conv(3, 4),
            b=conv(4, 6, dead=[0, 1, 2, 3], padding=1),
            c=conv(6, 2),
        ),
        IMAGE,
        {"b": 2, "a": 4},
        "a has other readers, the dead rows of b go",
    ),
    "dead-chain": Case(
        lambda: Net(
            lambda m, x: m.d(x) + m.c(m.b(m.a(x).relu()).relu()),
            a=conv(3, 6, padding=1),
            b=conv(6, 6, padding=1),
            c=kill(conv(6, 4, padding=1), slice(0, 4)),
            d=conv(3, 4, padding=1),
        ),
        IMAGE,
        {"a": 1, "b": 1},
        "a branch without an outlet: one channel is what the forward code needs",
    ),
    "conv1d": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).tanh()), a=kill(nn.Conv1d(3, 8, 3), DEAD, 0.4), b=nn.Conv1d(8, 4, 3)
        ),
        (2, 3, 9),
        {"a": 5},
        "one spatial dimension",
    ),
    "conv3d": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)), a=kill(nn.Conv3d(3, 8, 2), DEAD, 0.4), b=nn.Conv3d(8, 4, 2)),
        (2, 3, 4, 4, 4),
        {"a": 5},
        "three",
    ),
    "strided-dilated": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)), a=conv(3, 8, dead=DEAD, bias=0.4), b=conv(8, 4, stride=2, dilation=2)
        ),
        IMAGE,
        {"a": 5},
        "no border effects",
    ),
    "transposed-dead": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)),
            a=kill(nn.ConvTranspose2d(3, 8, 2, stride=2), DEAD, 0.0, dim=1),
            b=conv(8, 4, padding=1),
        ),
        IMAGE,
        {"b": 4},
        "its filters are dimension 1",
    ),
    "transposed-reader-of-zero": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)), a=conv(3, 8, dead=DEAD), b=nn.ConvTranspose2d(8, 4, 3, stride=2)
        ),
        IMAGE,
        {"a": 5},
        "0 spreads to 0",
    ),
    "transposed-reader-of-constant": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x)),
            a=conv(3, 8, dead=DEAD, bias=0.4),
            b=nn.ConvTranspose2d(8, 4, 3, stride=2),
        ),
        IMAGE,
        {"a": 6},
        "outputs of a constant depend on the phase of the stride, but those of all constants alike",
    ),
    "depthwise": Case(
        lambda: Net(
            lambda m, x: m.c(m.n(m.b(m.a(x).relu())).relu()),
            a=conv(3, 8, dead=DEAD),
            b=nn.Conv2d(8, 8, 3, padding=1, groups=8),
            n=norm(8, DEAD, -1),
            c=conv(8, 4),
        ),
        IMAGE,
        {"a": 5, "b": 5},
        "each channel has its own filter",
    ),
    "depthwise-multiplier": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
            a=conv(3, 8, dead=DEAD),
            b=nn.Conv2d(8, 16, 3, groups=8),
            c=conv(16, 4),
        ),
        IMAGE,
        {"a": 5, "b": 10},
        "the two filters of a channel leave with it",
    ),
    "depthwise-dead-itself": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).relu())),
            a=conv(3, 8),
            b=conv(8, 8, dead=DEAD, groups=8, bias=0.3),
            c=conv(8, 4),
        ),
        IMAGE,
        {"a": 5, "b": 5},
        "then nobody reads its input",
    ),
    "groups-evenly": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
            a=conv(3, 8, dead=[0, 5]),
            b=conv(8, 12, dead=[1, 11], groups=2, padding=1),
            c=conv(12, 4),
        ),
        IMAGE,
        {"a": 6, "b": 10},
        "different inputs of each group, as many of each",
    ),
    "groups-unevenly": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
            a=conv(3, 8, dead=[0, 1, 5]),
            b=conv(8, 12, dead=[1, 2, 11], groups=2, padding=1),
            c=conv(12, 4),
        ),
        IMAGE,
        {"a": 6, "b": 10},
        "a dead channel stays so that groups are of one size",
    ),
    "whole-group": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x).relu()).relu()),
            a=conv(3, 9, dead=[3, 4, 5]),
            b=conv(9, 12, dead=[4, 5, 6, 7], groups=3, padding=1),
            c=conv(12, 4),
        ),
        IMAGE,
        {"a": 6, "b": 8},
        "the group goes",
    ),
    "groups-absorb": Case(
        lambda: Net(
            lambda m, x: m.c(m.b(m.a(x)).relu()),
            a=conv(3, 8, dead=[0, 5], bias=0.9),
            b=conv(8, 6, dead=[0, 3], groups=2, bias=0.2),
            c=conv(6, 4, 1),
        ),
        IMAGE,
        {"a": 6, "b": 4},
        "constants go into the bias of their own group",
    ),
    "flatten": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x).relu().flatten(1)), a=conv(3, 8, dead=DEAD, bias=0.5), c=linear(8 * 36, 4)
        ),
        IMAGE,
        {"a": 5},
        "a channel is 36 columns of the linear layer",
    ),
    "flatten-after-padding": Case(
        lambda: Net(
            lambda m, x: m.c(F.pad(m.a(x), (1, 0)).flatten(1)), a=conv(3, 8, dead=DEAD), c=linear(8 * 42, 4)
        ),
        IMAGE,
        {"a": 5},
        "a border of 0 in it",
    ),
    "feed-forward": Case(
        lambda: Net(lambda m, x: x + m.c(F.gelu(m.a(x))), a=linear(6, 12, DEAD, 0.5), c=linear(12, 6)),
        TOKENS,
        {"a": 9},
        "gelu(0.5) becomes the bias of the next layer",
    ),
    "matmul-with-a-parameter": Case(
        lambda: Net(
            lambda m, x: torch.matmul(m.a(x).relu(), m.s.weight.t()), a=linear(6, 8, DEAD), s=nn.Linear(8, 4)
        ),
        TOKENS,
        {"a": 5},
        "a linear layer written out",
    ),
    "shared-layer": Case(
        lambda: Net(lambda m, x: m.b(m.a(m.a(x).relu()).relu()), a=linear(6, 6, [0, 1]), b=linear(6, 3)),
        (2, 6),
        {"a": 6},
        "its inputs are the model's",
    ),
    "shared-reader": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x).relu()) + m.c(m.b(x).relu()),
            a=conv(3, 8, dead=DEAD, bias=0.5),
            b=conv(3, 8, dead=DEAD, bias=0.5),
            c=conv(8, 4),
        ),
        IMAGE,
        {"a": 5, "b": 5},
        "one bias takes one constant, which both calls have",
    ),
    "shared-reader-of-two-constants": Case(
        lambda: Net(
            lambda m, x: m.c(m.a(x).relu()) + m.c(m.b(x).relu()),
            a=conv(3, 8, dead=DEAD, bias=0.5),
            b=conv(3, 8, dead=DEAD, bias=0.6),
            c=conv(8, 4),
        ),
        IMAGE,
        {"a": 8, "b": 8},
        "one bias cannot take two",
    ),
    "one-channel": Case(
        lambda: Net(lambda m, x: m.b(m.a(x)) * x, a=conv(3, 1, dead=[0], padding=1), b=conv(1, 3, padding=1)),
        IMAGE,
        {"a": 1},
        "not a depthwise convolution, and the last channel stays",
    ),
    "option-a-shortcut": Case(
        lambda: Net(
            lambda m, x: m.c(F.pad(m.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.b(m.a(x))),
            a=conv(3, 4, dead=[1]),
            b=conv(4, 8, dead=[0, 3, 4], stride=2, padding=1),
            c=conv(8, 2, padding=1),
        ),
        IMAGE,
        {"a": 3, "b": 7},
        "channel 1 is channel 3 after the padding; the padded ones are counted in the code",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_removal(name: str) -> None:
    check_case(CASES[name])
