"""Dead channels in front of ops that sum over them: recurrent layers, einsum, products, vector norms; and behind
pixel shuffle. In every net `a` is the layer with dead filters; `left` says how many must be left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruning_nets import DEAD, IMAGE, TOKENS, Case, Net, check_case, conv, linear
from torch import Tensor, nn

from ffr_ext import compact

FOUR = slice(0, 4)


def recurrent(make: Any, beta: float, **kw: Any) -> Case:
    return Case(
        lambda: Net(
            lambda m, x: m.o(m.r(m.a(x).relu())[0][:, -1]),
            a=linear(6, 8, DEAD, beta),
            r=make(8, 5, batch_first=True, **kw),
            o=nn.Linear(10 if kw.get("bidirectional") else kw.get("proj_size", 5), 3),
        ),
        TOKENS,
        {"a": 5, "r.input_size": 5},
        "constants go into the input biases of all gates",
    )


def cell(make: Any) -> Case:
    return Case(
        lambda: Net(
            lambda m, x: m.o(_first(m.r(m.a(x[:, 0]).relu()))),
            a=linear(6, 8, DEAD, 0.4),
            r=make(8, 5),
            o=nn.Linear(5, 3),
        ),
        TOKENS,
        {"a": 5, "r.input_size": 5},
        "one step at a time",
    )


def all_norms(h: Tensor) -> Tensor:
    return (
        h.norm(dim=-1) + h.norm(p=1, dim=-1) + torch.linalg.norm(h, dim=-1) + h.norm(p=float("inf"), dim=-1)
    )


def _first(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def einsum(equation: str, shape: tuple[int, ...], first: bool = False) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).relu()
        return torch.einsum(equation, *((m.w, h) if first else (h, m.w)))

    def make() -> nn.Module:
        torch.manual_seed(0)
        net = Net(forward, a=conv(3, 8, dead=DEAD, bias=0.7))
        net.w = nn.Parameter(torch.randn(shape))
        return net

    return Case(
        make, IMAGE, {"a": 6}, "a matrix product: one channel carries the constants, for there is no bias"
    )


def zero_einsum() -> nn.Module:
    net = Net(
        lambda m, x: torch.einsum("bchw,bdhw->bcd", m.a(x).relu(), m.b(x)).mean((1, 2)) * m.g,
        a=conv(3, 8, dead=DEAD),
        b=conv(3, 4),
    )
    net.g = nn.Parameter(torch.ones(()))
    return net


def shuffled(dead: Any, bias: float = 0.0) -> nn.Module:
    return Net(
        lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)),
        a=conv(3, 16, dead=dead, bias=bias),
        c=conv(4, 3, padding=1),
    )


CASES = {
    "lstm-zero": recurrent(nn.LSTM, 0.0),
    "lstm-constant": recurrent(nn.LSTM, 0.7),
    "lstm-bidirectional-two-layers": recurrent(nn.LSTM, 0.7, num_layers=2, bidirectional=True),
    "lstm-projected": recurrent(nn.LSTM, 0.7, proj_size=3),
    "gru-constant": recurrent(nn.GRU, 0.7),
    "rnn-constant": recurrent(nn.RNN, 0.7),
    "rnn-relu": recurrent(nn.RNN, 0.7, nonlinearity="relu"),
    "lstm-cell": cell(nn.LSTMCell),
    "gru-cell": cell(nn.GRUCell),
    "rnn-cell": cell(nn.RNNCell),
    "gru-without-biases": recurrent(nn.GRU, 0.7, bias=False)._replace(
        left={"a": 6, "r.input_size": 6}, reason="one constant carries the others"
    ),
    "einsum-weight-last": einsum("bchw,oc->bohw", (5, 8)),
    "einsum-weight-first": einsum("co,bchw->bohw", (8, 5), first=True),
    "einsum-outputs-last": einsum("bchw,co->bhwo", (8, 5)),
    "einsum-implicit": einsum("zchw,oc", (5, 8)),
    "einsum-ellipsis": Case(
        lambda: _with(
            Net(lambda m, x: torch.einsum("...c,oc->...o", m.a(x), m.w), a=linear(6, 8, DEAD)), (4, 8)
        ),
        TOKENS,
        {"a": 5},
        "any leading dimensions",
    ),
    "einsum-of-heads": Case(
        lambda: _with(
            Net(
                lambda m, x: torch.einsum("bthd,hde->bte", m.a(x).unflatten(-1, (4, 2)), m.w),
                a=linear(6, 8, slice(0, 4)),
            ),
            (4, 2, 3),
        ),
        TOKENS,
        {"a": 8},
        "a sum over two dimensions at once",
    ),
    "gram-matrix": Case(
        lambda: Net(
            lambda m, x: torch.matmul(m.a(x).flatten(2).transpose(1, 2), m.b(x).flatten(2)),
            a=conv(3, 8, dead=DEAD),
            b=conv(3, 8, dead=[5]),
        ),
        IMAGE,
        {"a": 4, "b": 4},
        "a product is 0 where either factor is",
    ),
    "normalize": Case(
        lambda: Net(lambda m, x: m.o(F.normalize(m.a(x), dim=-1)), a=linear(6, 8, DEAD), o=nn.Linear(8, 3)),
        TOKENS,
        {"a": 5},
        "zeros do not change a norm",
    ),
    "normalize-constant": Case(
        lambda: Net(
            lambda m, x: m.o(F.normalize(m.a(x), dim=-1)), a=linear(6, 8, DEAD, 0.5), o=nn.Linear(8, 3)
        ),
        TOKENS,
        {"a": 8},
        "constants do",
    ),
    "norms": Case(
        lambda: Net(
            lambda m, x: all_norms(m.a(x)),
            a=linear(6, 8, DEAD),
        ),
        TOKENS,
        {"a": 5},
        "norms of all orders that count what is not 0",
    ),
    "smallest": Case(
        lambda: Net(
            lambda m, x: torch.linalg.vector_norm(m.a(x), float("-inf"), dim=-1), a=linear(6, 8, DEAD)
        ),
        TOKENS,
        {"a": 8},
        "the norm of order -inf is the smallest, which 0 is",
    ),
    "sum-of-squares": Case(
        lambda: Net(
            lambda m, x: m.a(x).pow(2).sum(1, keepdim=True).sqrt() * x.mean(), a=conv(3, 8, dead=DEAD)
        ),
        IMAGE,
        {"a": 5},
        "a sum of zeros",
    ),
    "mean-over-channels": Case(
        lambda: Net(lambda m, x: m.a(x).mean(1), a=conv(3, 8, dead=DEAD)),
        IMAGE,
        {"a": 8},
        "a mean counts its channels",
    ),
    "pixel-shuffle": Case(
        lambda: shuffled(slice(0, 8)), IMAGE, {"a": 8, "c.in_channels": 2}, "two groups of four"
    ),
    "pixel-shuffle-part": Case(
        lambda: shuffled(slice(0, 7)), IMAGE, {"a": 12}, "one group, and a part that stays"
    ),
    "pixel-shuffle-constant": Case(
        lambda: shuffled(slice(0, 12), 0.5), IMAGE, {"a": 8}, "one of three constants carries the others"
    ),
    "pixel-unshuffle": Case(
        lambda: Net(
            lambda m, x: m.c(F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 8, dead=DEAD), c=conv(32, 3, 1)
        ),
        IMAGE,
        {"a": 5, "c.in_channels": 20},
        "each channel is four of the next layer",
    ),
}


def _with(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    net.w = nn.Parameter(torch.randn(shape))
    return net


@pytest.mark.parametrize("name", CASES)
def test_exact_removal(name: str) -> None:
    check_case(CASES[name])


def test_a_pattern_of_constants_stays() -> None:
    """The four channels of one result differ: that is no constant behind the shuffle."""
    model = shuffled(slice(0, 4)).eval()
    with torch.no_grad():
        model.a.bias[:4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert compact(model, torch.randn(IMAGE), measure=False).model.a.out_channels == 16
