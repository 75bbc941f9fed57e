"""What the native ops refuse. Their kernels check nothing, so an argument that slips through reads or writes
memory it does not own; each case below breaks one line of the op contract (docs/design.md, section 5), and
the message must name the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ffr_ext import backends, ops

pytestmark = pytest.mark.skipif(backends.native() is None, reason="needs the native library")

N, LENGTHS = 2 * 3 * 4 * 4, [3, 2]


def features(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 3, 4, 4, dtype=torch.float64).to(dtype) for _ in range(sum(LENGTHS))]


def stats() -> Tensor:
    return torch.empty(sum(ops.stats_entries(length, 1) for length in LENGTHS), dtype=torch.float64)


def signs(length: int | None = None) -> Tensor:
    lengths = LENGTHS if length is None else [length]
    return torch.zeros(sum(ops.sign_bytes(length, N) for length in lengths), dtype=torch.uint8)


def without_signs() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


def call(op: str, good: dict[str, Any], **bad: Any) -> None:
    """The op with good arguments, or with some of them replaced by ``change(good argument)``."""
    arguments = {name: bad[name](value) if name in bad else value for name, value in good.items()}
    getattr(torch.ops.ffr_ext, op)(*arguments.values())


def change(index: int, to: Any) -> Any:
    """A list with one entry replaced by ``to(entry)``."""
    return lambda items: [to(item) if i == index else item for i, item in enumerate(items)]


def strided(x: Tensor) -> Tensor:
    """The same sizes, every other element of a larger tensor."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def overlapping(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def forward() -> dict[str, Any]:
    return dict(
        features=features(),
        lengths=LENGTHS,
        groups=[1, 1],
        squared=False,
        stats=stats(),
        signs=signs(),
        weights=torch.ones_like(stats()),
        loss=torch.empty(()),
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            dict(groups=lambda g: g[:1]),
            "groups must have one entry for each of the 2 stages of lengths, got 1",
        ),
        (dict(groups=lambda g: [1, 5]), r"groups\[1\] must divide the 96 elements of a feature, got 5"),
        (dict(groups=lambda g: [0, 1]), r"groups\[0\] must divide the 96 elements of a feature, got 0"),
        (dict(groups=lambda g: [-1, 1]), r"groups\[0\] must divide .* got -1"),
        (dict(lengths=lambda n: [3, 3]), r"features must have sum\(lengths\) = 6 tensors, got 5"),
        (dict(lengths=lambda n: [6, -1]), r"lengths\[1\] must not be negative, got -1"),
        (
            dict(features=change(1, lambda x: x[:1])),
            r"features\[1\] must have the 96 elements of its stage, got 48",
        ),
        (
            dict(features=change(1, lambda x: x.double())),
            r"features\[1\] must have the dtype of features\[0\].*Float; got Double",
        ),
        (
            dict(features=change(0, lambda x: x.int())),
            r"features\[0\] must be Half, BFloat16, Float or Double, got Int",
        ),
        (
            dict(features=change(4, channels_last)),
            r"features\[4\] must have the layout of features\[3\].*strides \[48, 16, 4, 1\]; got",
        ),
        (
            dict(features=change(1, lambda x: x.view(3, 2, 4, 4))),
            r"features\[1\] must have the layout of features\[0\]",
        ),
        (dict(features=change(3, strided)), r"features\[3\] must be dense \(no gaps, no overlaps\)"),
        (dict(features=change(0, overlapping)), r"features\[0\] must be dense"),
        (dict(stats=lambda s: s.float()), "stats must be Double, got Float"),
        (dict(stats=lambda s: s[:-1]), r"stats must have 4 elements, got 3"),
        (dict(stats=lambda s: s.view(2, 2)), "stats must be contiguous with 1 dimension"),
        (dict(stats=lambda s: s.repeat(2)[::2]), r"stats must be contiguous .* strides \[2\]"),
        (dict(signs=lambda s: s.char()), "signs must be Byte, got Char"),
        (dict(signs=lambda s: s[:-1]), "signs must have 144 elements, got 143"),
        (dict(squared=lambda s: True), "signs must be empty with squared=True, got 144 bytes"),
        (dict(loss=lambda x: None), "weights and loss must be given together, got only weights"),
        (dict(weights=lambda w: None), "weights and loss must be given together, got only loss"),
        (dict(weights=lambda w: w[1:]), "weights must have 4 elements, got 3"),
        (dict(weights=lambda w: w.float()), "weights must be Double, got Float"),
        (dict(loss=lambda x: x.bfloat16()), "loss must be Float or Double, got BFloat16"),
        (dict(loss=lambda x: x.expand(2)), "loss must have 1 element, got 2"),
    ],
)
def test_flow_forward_refuses(bad: dict[str, Any], message: str) -> None:
    call("flow_forward", forward())
    with pytest.raises(RuntimeError, match=message):
        call("flow_forward", forward(), **bad)


def backward(squared: bool) -> dict[str, Any]:
    return dict(
        features=features() if squared else [],
        signs=without_signs() if squared else signs(),
        coef=torch.ones_like(stats()),
        lengths=LENGTHS,
        numels=[N, N],
        groups=[1, 1],
        squared=squared,
        grads=[torch.empty_like(f) for f in features()],
        upstream=torch.ones(()),
    )


@pytest.mark.parametrize(
    ("squared", "bad", "message"),
    [
        (False, dict(numels=lambda n: n[:1]), "numels must have one entry for each of the 2 stages"),
        (
            False,
            dict(numels=lambda n: [N, N + 2]),
            r"grads\[3\] must have the 98 elements of its stage, got 96",
        ),
        (False, dict(numels=lambda n: [-N, N]), r"numels\[0\] must not be negative, got -96"),
        (
            False,
            dict(groups=lambda g: [7, 1]),
            r"groups\[0\] must divide the 96 elements of a feature, got 7",
        ),
        (False, dict(grads=lambda g: g[:-1]), r"grads must have sum\(lengths\) = 5 tensors, got 4"),
        (
            False,
            dict(grads=change(2, lambda g: g[:1])),
            r"grads\[2\] must have the 96 elements of its stage, got 48",
        ),
        (
            False,
            dict(grads=change(2, lambda g: g.half())),
            r"grads\[2\] must have the dtype of grads\[0\].*Float; got Half",
        ),
        (False, dict(grads=change(4, channels_last)), r"grads\[4\] must have the layout of grads\[3\]"),
        (False, dict(grads=change(0, strided)), r"grads\[0\] must be dense"),
        (
            False,
            dict(features=lambda f: features()),
            "features must have 0 tensors with squared=False, got 5",
        ),
        (False, dict(signs=lambda s: s[1:]), "signs must have 144 elements, got 143"),
        (False, dict(coef=lambda c: c[1:]), "coef must have 4 elements, got 3"),
        (False, dict(coef=lambda c: c.expand(2, 4)[0].float()), "coef must be Double, got Float"),
        (False, dict(coef=lambda c: c[:1].expand(4)), r"coef must be contiguous .* strides \[0\]"),
        (True, dict(features=lambda f: f[1:]), "features must have 5 tensors with squared=True, got 4"),
        (
            True,
            dict(features=change(1, channels_last)),
            r"features\[1\] must have the layout of features\[0\]",
        ),
        (
            True,
            dict(features=change(0, lambda f: f[:0])),
            r"features\[0\] must have the 96 elements of its stage, got 0",
        ),
        (
            True,
            dict(grads=lambda g: [channels_last(x) for x in g]),
            r"grads\[0\] must have the dtype and layout of features\[0\]",
        ),
        (
            True,
            dict(grads=lambda g: [x.double() for x in g]),
            r"grads\[0\] must have the dtype and layout of features\[0\], Float",
        ),
        (True, dict(signs=lambda s: signs()), "signs must have 0 elements, got 144"),
        (False, dict(upstream=lambda u: u.long()), "upstream must be Float or Double, got Long"),
        (True, dict(upstream=lambda u: u.expand(4)), "upstream must have 1 element, got 4"),
    ],
)
def test_flow_backward_refuses(squared: bool, bad: dict[str, Any], message: str) -> None:
    call("flow_backward", backward(squared))
    with pytest.raises(RuntimeError, match=message):
        call("flow_backward", backward(squared), **bad)


def backward_at(squared: bool) -> dict[str, Any]:
    length = 6
    return dict(
        features=[torch.randn(2, 3, 4, 4) for _ in range(length)] if squared else [],
        signs=without_signs() if squared else signs(length),
        coef=torch.ones(ops.stats_entries(length, 1), dtype=torch.float64),
        length=length,
        numel=N,
        groups=1,
        squared=squared,
        index=2,
        grad=torch.zeros(2, 3, 4, 4),
        accumulate=False,
    )


@pytest.mark.parametrize(
    ("squared", "bad", "message"),
    [
        (False, dict(index=lambda i: 6), r"index must be in \[0, 6\), got 6"),
        (False, dict(index=lambda i: -1), r"index must be in \[0, 6\), got -1"),
        (False, dict(length=lambda n: 0), "length must be at least 1, got 0"),
        (False, dict(length=lambda n: 5), r"coef must have 7 elements, got 9"),
        (False, dict(numel=lambda n: 2 * N), r"grad\[0\] must have the 192 elements of its stage, got 96"),
        (False, dict(grad=strided), r"grad\[0\] must be dense"),
        (
            False,
            dict(grad=lambda g: g.long()),
            r"grad\[0\] must be Half, BFloat16, Float or Double, got Long",
        ),
        (False, dict(signs=lambda s: s[16:]), "signs must have 240 elements, got 224"),
        (
            True,
            dict(features=change(4, lambda f: f[:0])),
            r"features\[4\] must have the dtype and layout of grad",
        ),
        (
            True,
            dict(features=change(0, lambda f: f.double())),
            r"features\[0\] must have the dtype and layout of grad",
        ),
        (True, dict(features=lambda f: f[:-1]), "features must have 6 tensors with squared=True, got 5"),
    ],
)
def test_flow_backward_at_refuses(squared: bool, bad: dict[str, Any], message: str) -> None:
    call("flow_backward_at", backward_at(squared))
    with pytest.raises(RuntimeError, match=message):
        call("flow_backward_at", backward_at(squared), **bad)


def test_features_that_are_not_read_may_be_empty() -> None:
    """Index 2 of 6 reads 0 to 4: a capture that frees features as it walks back passes empty tensors for the
    rest.
    """
    good = backward_at(True)
    call("flow_backward_at", good)
    expected = good["grad"].clone()
    call("flow_backward_at", good, features=change(5, lambda f: torch.empty(0, dtype=torch.int8)))
    assert torch.equal(good["grad"], expected)


def test_strides_of_dimensions_of_size_one_do_not_matter() -> None:
    """torch leaves them arbitrary: a [4, 1, 5, 5] tensor is contiguous and channels_last at once."""
    x = torch.randn(4, 1, 5, 5)
    y = torch.empty_strided((4, 1, 5, 5), (25, 1, 5, 1)).normal_()
    one = torch.empty(1, dtype=torch.float64)
    torch.ops.ffr_ext.flow_forward([x, y], [2], [1], False, one, without_signs())
    torch.testing.assert_close(one.item(), (y.double() - x.double()).abs().sum().item(), rtol=1e-6, atol=0)


def test_an_empty_batch_has_no_samples_and_no_statistics() -> None:
    empty = [torch.empty(0, 3, 4, 4) for _ in range(3)]
    nothing = torch.empty(0, dtype=torch.float64)
    torch.ops.ffr_ext.flow_forward(empty, [3], [0], True, nothing, without_signs())
    zeros = torch.full((3,), math.nan, dtype=torch.float64)
    torch.ops.ffr_ext.flow_forward(empty, [3], [1], False, zeros, without_signs())
    assert zeros.tolist() == [0.0, 0.0, 0.0]


def norms() -> dict[str, Any]:
    weights = [torch.randn(4, 3, 2, 2), torch.randn(5, 6)]
    return dict(weights=weights, dims=[0, 1], p=2.0, out=torch.empty(4 + 6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(dims=lambda d: [0]), "dims must have one entry for each of the 2 weights, got 1"),
        (
            dict(dims=lambda d: [4, 1]),
            r"dims\[0\] must be in \[0, 4\) for weights\[0\] of sizes \[4, 3, 2, 2\], got 4",
        ),
        (dict(dims=lambda d: [0, -2]), r"dims\[1\] must be in \[0, 2\) .* got -2"),
        (dict(dims=lambda d: [-1, 1]), "out must have 13 elements, got 10"),
        (
            dict(dims=lambda d: [0, -1], weights=change(1, lambda w: w[0])),
            r"weights\[1\] must have 2 dimensions or more for dims\[1\] = -1, got sizes \[6\]",
        ),
        (dict(p=lambda p: 3.0), "p must be 1, 2 or inf, got 3"),
        (dict(p=lambda p: -math.inf), "p must be 1, 2 or inf, got -inf"),
        (dict(p=lambda p: math.nan), "p must be 1, 2 or inf, got -?nan"),
        (
            dict(weights=change(1, lambda w: w.int())),
            r"weights\[1\] must be Half, BFloat16, Float or Double, got Int",
        ),
        (dict(weights=change(0, strided)), r"weights\[0\] must be dense"),
        (dict(out=lambda o: o[:-1]), "out must have 10 elements, got 9"),
        (dict(out=lambda o: o.float()), "out must be Double, got Float"),
    ],
)
def test_filter_norms_refuses(bad: dict[str, Any], message: str) -> None:
    call("filter_norms", norms())
    with pytest.raises(RuntimeError, match=message):
        call("filter_norms", norms(), **bad)


def compaction() -> dict[str, Any]:
    source = torch.arange(4 * 3 * 2.0).view(4, 3, 2)
    return dict(
        tensors=[source, channels_last(torch.randn(2, 5, 3, 3))],
        keep=[torch.tensor([2, 0]), torch.tensor([4, 1, 0])],
        dims=[0, 1],
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(keep=lambda k: k[:1]), "keep must have one entry for each of the 2 tensors, got 1"),
        (dict(dims=lambda d: [0]), "dims must have one entry for each of the 2 tensors, got 1"),
        (dict(dims=lambda d: [3, 1]), r"dims\[0\] must be in \[0, 3\) for tensors\[0\]"),
        (dict(dims=lambda d: [0, -1]), r"dims\[1\] must be in \[0, 4\) for tensors\[1\] .* got -1"),
        (dict(keep=change(0, lambda k: k.int())), r"keep\[0\] must be Long, got Int"),
        (dict(keep=change(0, lambda k: k[None])), r"keep\[0\] must be contiguous with 1 dimension"),
        (dict(tensors=change(0, strided)), r"tensors\[0\] must be dense"),
    ],
)
def test_compact_filters_refuses(bad: dict[str, Any], message: str) -> None:
    call("compact_filters", compaction())
    with pytest.raises(RuntimeError, match=message):
        call("compact_filters", compaction(), **bad)


@pytest.mark.parametrize(
    ("place", "indices"),
    [(0, [0, 4]), (0, [-1]), (1, [0, -1, 2]), (1, [2, 0, 2]), (1, [2**40])],
    ids=["too large", "negative", "negative, second tensor", "twice", "far outside"],
)
def test_compact_filters_gathers_nothing_and_says_which_indices_are_wrong(
    place: int, indices: list[int]
) -> None:
    good = compaction()
    assert torch.ops.ffr_ext.compact_filters(*good.values())[1] == -1
    good["keep"][place] = torch.tensor(indices)
    assert torch.ops.ffr_ext.compact_filters(*good.values())[1] == place


def scaling() -> dict[str, Any]:
    weights = [torch.randn(4, 3, 2, 2), torch.randn(5, dtype=torch.float64)]
    return dict(
        grads=[torch.randn_like(w) for w in weights],
        weights=weights,
        rows=[torch.randn(4), torch.randn(5).double()],
        columns=[torch.randn(3), torch.empty(0)],
        slopes=[0.0, 1.0],
        taus=[0.0, 1.0],
    )


SCALING = [
    (dict(weights=lambda w: w[:1]), "(grads|rows) must have one entry for each of the 1 tensors, got 2"),
    (dict(rows=lambda r: r[:1]), "rows must have one entry for each of the 2 tensors, got 1"),
    (dict(columns=lambda c: c[:1]), "columns must have one entry for each of the 2 tensors, got 1"),
    (dict(taus=lambda t: t[:1]), "taus must have one entry for each of the 2 tensors, got 1"),
    (dict(taus=lambda t: [0.0, -1.0]), r"taus\[1\] must be 0 or more, got -1"),
    (dict(taus=lambda t: [math.nan, 0.0]), r"taus\[0\] must be 0 or more, got -?nan"),
    (dict(weights=change(0, strided), grads=change(0, strided)), r"weights\[0\] must be dense"),
    (dict(weights=change(0, lambda w: w.int())), r"weights\[0\] must be Half, BFloat16, Float or Double"),
    (
        dict(weights=change(1, lambda w: w[0]), grads=change(1, lambda g: g[0])),
        "must have at least 1 dimension",
    ),
    (dict(rows=change(0, lambda r: r.double())), r"rows\[0\] must be Float, got Double"),
    (dict(rows=change(1, lambda r: r.float())), r"rows\[1\] must be Double, got Float"),
    (dict(rows=change(0, lambda r: r[:3])), r"rows\[0\] must have 4 elements, got 3"),
    (dict(rows=change(0, lambda r: torch.randn(8)[::2])), r"rows\[0\] must be contiguous with 1 dimension"),
    (dict(columns=change(0, lambda c: torch.randn(4))), r"columns\[0\] must have 3 elements, got 4"),
    (dict(columns=change(1, lambda c: torch.randn(1).double())), r"columns\[1\] must have 0 elements, got 1"),
]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        *SCALING,
        (dict(slopes=lambda t: t[:1]), "slopes must have one entry for each of the 2 tensors, got 1"),
        (
            dict(grads=change(0, lambda g: g.half())),
            r"grads\[0\] must have the dtype and layout of weights\[0\]",
        ),
        (
            dict(grads=change(0, channels_last)),
            r"grads\[0\] must have the dtype and layout .* \[12, 1, 6, 3\]",
        ),
        (
            dict(grads=change(0, lambda g: g[:3])),
            r"grads\[0\] must have the dtype and layout of weights\[0\]",
        ),
    ],
)
def test_add_scaled_refuses(bad: dict[str, Any], message: str) -> None:
    call("add_scaled_", scaling())
    with pytest.raises(RuntimeError, match=message):
        call("add_scaled_", scaling(), **bad)


@pytest.mark.parametrize(("bad", "message"), SCALING)
def test_shrink_refuses(bad: dict[str, Any], message: str) -> None:
    good = {name: value for name, value in scaling().items() if name not in ("grads", "slopes")}
    call("shrink_", good)
    with pytest.raises(RuntimeError, match=message):
        call("shrink_", good, **bad)


@pytest.mark.parametrize(
    ("shape", "dim", "keep"),
    [
        ((4, 0, 3), 0, [3, 1]),  # no elements, some filters
        ((0, 3), 0, []),  # no filters at all
        ((3, 4), 1, []),  # nothing is kept
        ((1, 4, 1), 0, [0]),  # dimensions of size 1 around it
    ],
)
def test_compact_filters_takes_sizes_zero_and_one(shape: tuple[int, ...], dim: int, keep: list[int]) -> None:
    source, index = torch.randn(shape), torch.tensor(keep, dtype=torch.int64)
    expected = source.index_select(dim, index)
    (out,), wrong = torch.ops.ffr_ext.compact_filters([source], [index], [dim])
    assert wrong == -1
    assert torch.equal(out, expected)
