"""`torch.library.opcheck` on every op, and one schema for each."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_oracle import check_loss_and_upstream
from torch import Tensor

from ffr_ext import backends, ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


def _arguments(
    lengths: list[int], dtype: torch.dtype, layout: str, squared: bool, per_sample: bool
) -> dict[str, Any]:
    shapes = [(2, 3, 4, 5), (2, 6, 2, 2), (2, 1, 3, 3)]
    features = [
        LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(dtype))
        for shape, length in zip(shapes, lengths, strict=False)
        for _ in range(length)
    ]
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    numels = [features[first].numel() for first in firsts]
    groups = [2 if per_sample else 1] * len(lengths)
    entries = sum(ops.stats_entries(n, g) for n, g in zip(lengths, groups, strict=True))
    signs = 0 if squared else sum(ops.sign_bytes(n, numel) for n, numel in zip(lengths, numels, strict=True))
    return dict(
        features=features,
        lengths=lengths,
        groups=groups,
        numels=numels,
        squared=squared,
        stats=torch.empty(entries, dtype=torch.float64),
        signs=torch.zeros(signs, dtype=torch.uint8),
        coef=torch.randn(entries, dtype=torch.float64),
        loss=torch.empty((), dtype=dtype if dtype == torch.float64 else torch.float32),
        grads=[torch.empty_like(f) for f in features],
    )


SAMPLES = [
    (lengths, dtype, layout, *kind)
    for lengths, dtype, layout, kind in itertools.product(
        ([3, 2], [1, 5, 2]), DTYPES, LAYOUTS, ((False, False), (True, False), (True, True))
    )
]


def _native() -> None:
    if backends.native() is None:
        pytest.skip(f"no native library: {backends.native_error()}")


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_opcheck_of_the_loss_kernels(sample: Any) -> None:
    _native()
    a = _arguments(*sample)
    kernels = ops.FLOW_KERNELS["cpu"]
    forward = (a["features"], a["lengths"], a["groups"], a["squared"], a["stats"], a["signs"])
    torch.library.opcheck(kernels.forward, forward)
    torch.library.opcheck(kernels.forward, (*forward, a["coef"], a["loss"]))
    kernels.forward(*forward)
    read = a["features"] if a["squared"] else []
    backward = (read, a["signs"], a["coef"], a["lengths"], a["numels"], a["groups"], a["squared"], a["grads"])
    torch.library.opcheck(kernels.backward, backward)
    torch.library.opcheck(kernels.backward, (*backward, a["loss"].fill_(0.3)))
    last = len(a["lengths"]) - 1
    first = sum(a["lengths"][:last])
    length, numel, groups = a["lengths"][last], a["numels"][last], a["groups"][last]
    entries = ops.stats_entries(length, groups)
    signs = (
        a["signs"][a["signs"].numel() - ops.sign_bytes(length, numel) :] if not a["squared"] else a["signs"]
    )
    for accumulate in (False, True):
        torch.library.opcheck(
            kernels.backward_at,
            (
                read[first:],
                signs,
                a["coef"][-entries:].clone(),
                length,
                numel,
                groups,
                a["squared"],
                1,
                torch.zeros_like(a["grads"][first + 1]),
                accumulate,
            ),
        )


@pytest.mark.parametrize("squared", [False, True], ids=["abs", "squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_loss_is_a_weighted_sum_of_stats_and_its_upstream_gradient_a_factor(
    dtype: torch.dtype, squared: bool
) -> None:
    _native()
    check_loss_and_upstream(torch.ops.ffr_ext, dtype, squared)


def test_backward_at_is_backward_one_feature_at_a_time() -> None:
    _native()
    kernels = ops.FLOW_KERNELS["cpu"]
    for squared, per_sample in ((False, False), (True, False), (True, True)):
        a = _arguments([5], torch.float32, "contiguous", squared, per_sample)
        kernels.forward(a["features"], a["lengths"], a["groups"], squared, a["stats"], a["signs"])
        read = a["features"] if squared else []
        sizes = (a["lengths"], a["numels"], a["groups"], squared)
        kernels.backward(read, a["signs"], a["coef"], *sizes, a["grads"])
        for index, expected in enumerate(a["grads"]):
            near = [f if abs(i - index) <= 2 else f.new_empty(0) for i, f in enumerate(read)]
            at = (near, a["signs"], a["coef"], 5, a["numels"][0], a["groups"][0], squared, index)
            grad = torch.full_like(expected, float("nan"))
            kernels.backward_at(*at, grad, False)
            assert torch.equal(grad, expected)
            base = torch.randn_like(expected)
            total = base.clone()
            kernels.backward_at(*at, total, True)
            assert torch.allclose(total, base + expected, atol=1e-6)


def test_packed_signs_are_nibbles_with_the_documented_codes() -> None:
    _native()
    values = torch.tensor(
        [[0.0, 1.0, -1.0, float("nan"), 2.0], [0.0, 2.0, -3.0, 0.0, 1.0], [0.0, 3.0, 0.0, 0.0, 1.0]]
    )
    features = list(values)
    stats, signs = torch.empty(3, dtype=torch.float64), torch.zeros(ops.sign_bytes(3, 5), dtype=torch.uint8)
    ops.FLOW_KERNELS["cpu"].forward(features, [3], [1], False, stats, signs)
    planes = signs.view(2, 16)

    def nibble(plane: int, element: int) -> int:
        return (int(planes[plane, element // 2]) >> (4 * (element % 2))) & 15

    def code(x: Tensor) -> int:
        return 1 if x > 0 else 2 if x < 0 else 0  # NaN: 0, as torch.sign says

    for element in range(5):
        a, b, c = values[:, element]
        assert nibble(0, element) == code(b - a) + 4 * code(c - 2 * b + a)
        assert nibble(1, element) == code(c - b)


WEIGHTS = {
    "contiguous": torch.randn(6, 4, 3, 3),
    "channels_last": torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last),
    "channels_last, 1x1": torch.randn(6, 4, 1, 1).contiguous(memory_format=torch.channels_last),
    "transposed": torch.randn(4, 6).t(),
    "depthwise": torch.randn(6, 1, 3, 3),
    "vector": torch.randn(6).bfloat16(),
    "no inputs": torch.randn(6, 0),
    "3-D": torch.randn(2, 6, 5).permute(1, 2, 0).to(torch.float64),
}


def test_opcheck_of_the_pruning_kernels() -> None:
    _native()
    weights = list(WEIGHTS.values())
    keep, dims = [torch.tensor([4, 1])] * len(weights), [0] * len(weights)
    norms, compact = ops.kernel("filter_norms", "cpu"), ops.kernel("compact_filters", "cpu")
    torch.library.opcheck(norms, (weights, dims, 2.0, torch.empty(6 * len(weights)).double()))
    torch.library.opcheck(compact, (weights, keep, dims))


def test_opcheck_of_the_group_kernels() -> None:
    _native()
    weights = list(WEIGHTS.values())
    double = [torch.float64 if w.dtype == torch.float64 else torch.float32 for w in weights]
    rows = [torch.randn(w.shape[0], dtype=d) for w, d in zip(weights, double, strict=True)]
    columns = [
        torch.randn(w.shape[1] if w.dim() > 1 else 0, dtype=d) for w, d in zip(weights, double, strict=True)
    ]
    taus = [0.1] * len(weights)
    grads = [torch.randn_like(w) for w in weights]
    torch.library.opcheck(ops.kernel("add_scaled_", "cpu"), (grads, weights, rows, columns, taus, taus))
    torch.library.opcheck(ops.kernel("shrink_", "cpu"), (weights, rows, columns, taus))
    wide = [w for w in weights if w.dim() > 1]
    out = torch.empty(sum(w.shape[0] + w.shape[1] for w in wide), dtype=torch.float64)
    torch.library.opcheck(ops.kernel("filter_norms", "cpu"), (wide, [-1] * len(wide), 2.0, out))


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_new_tensors_lie_as_those_that_python_makes(name: str, kept: int) -> None:
    _native()
    weight = WEIGHTS[name]
    for dim in range(weight.dim()):
        keep = torch.arange(min(kept, weight.shape[dim]))
        (expected,) = ops.new_compacted([weight], [keep], [dim])
        (native,), _ = ops.kernel("compact_filters", "cpu")([weight], [keep], [dim])
        assert (native.shape, native.stride(), native.dtype) == (
            expected.shape,
            expected.stride(),
            expected.dtype,
        )
        assert torch.equal(native, weight.index_select(dim, keep))


def test_every_op_has_one_schema_for_all_its_implementations() -> None:
    for name in ops.SCHEMAS:
        packet = getattr(torch.ops.ffr_ext, name)
        assert set(packet.overloads()) == {"default", "triton"}
        native, triton = (str(getattr(packet, o)._schema).replace(".triton", "") for o in packet.overloads())
        assert native == triton
