"""What the native loss ops refuse. Their kernels check nothing, so an argument that slips through reads or writes
memory it does not own; each case below breaks one line of the op contract (docs/design.md, section 5), and
the message must name the argument, what was expected and what came.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from broken_arguments import call, change, channels_last, overlapping, strided
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
