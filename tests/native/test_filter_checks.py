"""What the native filter ops refuse. Their kernels check nothing, so an argument that slips through reads or writes
memory it does not own; each case below breaks one line of the op contract (docs/design.md, section 5), and
the message must name the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from broken_arguments import call, change, channels_last, strided

from ffr_ext import backends

pytestmark = pytest.mark.skipif(backends.native() is None, reason="needs the native library")


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
