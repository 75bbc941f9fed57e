"""Triton's filter_norms and compact_filters: one launch for a list of tensors of any shapes and dtypes.

The tensors are described by a table of integers that is copied to the device first. That copy is why these
two, other than the loss kernels, cannot be captured in a CUDA graph; pruning happens between training runs.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import ops
from . import sizes

_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
ROW = 16  # integers that describe a tensor, at most


@triton.jit
def owner(table, program, TENSORS: tl.constexpr, ROW: tl.constexpr):
    """The tensor a program works for: the number of tensors whose programs all come before it. Column 0:
    their end.
    """
    ends = tl.load(table + tl.arange(0, TENSORS) * ROW)
    return tl.sum((ends <= program).to(tl.int32))


@triton.jit
def _accumulate(data, elements, filters, filter, inner, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of magnitudes (1) or squares (2), or largest magnitude (0), of a filter of a tensor
    [outer][filters][inner].
    """
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, elements, BLOCK):
        i = begin + lane
        address = (i // inner * filters + filter) * inner + i % inner
        value = tl.abs(tl.load(data + address, mask=i < elements, other=0.0).to(tl.float64))
        if NORM == 2:
            total += value * value
        elif NORM == 1:
            total += value
        else:
            total = tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL)
    return total


@triton.jit
def norms_kernel(
    table, out, NORM: tl.constexpr, TENSORS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row = table + owner(table, program, TENSORS, ROW) * ROW
    filters = tl.load(row + 1)
    elements = tl.load(row + 2)  # of a filter
    inner = tl.load(row + 3)
    dtype = tl.load(row + 4)
    address = tl.load(row + 5)
    filter = program - (tl.load(row) - filters)
    # The pointer gets no name: one that has another type in every branch does not compile.
    if dtype == 0:
        total = _accumulate(
            address.to(tl.pointer_type(tl.float16)), elements, filters, filter, inner, NORM, BLOCK
        )
    elif dtype == 1:
        total = _accumulate(
            address.to(tl.pointer_type(tl.bfloat16)), elements, filters, filter, inner, NORM, BLOCK
        )
    elif dtype == 2:
        total = _accumulate(
            address.to(tl.pointer_type(tl.float32)), elements, filters, filter, inner, NORM, BLOCK
        )
    else:
        total = _accumulate(
            address.to(tl.pointer_type(tl.float64)), elements, filters, filter, inner, NORM, BLOCK
        )
    if NORM == 2:
        result = tl.sqrt(tl.sum(total))
    elif NORM == 1:
        result = tl.sum(total)
    else:
        # tl.max drops NaN; the sum of what is NaN is NaN, of the rest 0.
        result = tl.max(total) + tl.sum(tl.where(total != total, total, 0.0))
    tl.store(out + tl.load(row + 6) + program, result)


@triton.jit
def _gather(row, first, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    units = tl.load(row + 1)
    row_units = tl.load(row + 2)  # of one index: contiguous in source and target
    dim = tl.load(row + 3)
    num_keep = tl.load(row + 4)
    source = tl.load(row + 5).to(tl.pointer_type(UNIT))
    target = tl.load(row + 6).to(tl.pointer_type(UNIT))
    keep = tl.load(row + 7).to(tl.pointer_type(tl.int64))
    unit = first + tl.arange(0, BLOCK)
    mask = unit < units
    index = unit // row_units
    kept = tl.load(keep + index % num_keep, mask=mask, other=0)
    value = tl.load(
        source + (index // num_keep * dim + kept) * row_units + unit % row_units, mask=mask, other=0
    )
    tl.store(target + unit, value, mask=mask)


@triton.jit
def gather_kernel(table, units_of, TENSORS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    item = owner(table, program, TENSORS, ROW)
    row = table + item * ROW
    size = tl.load(units_of + 2 * item)
    first = (program - tl.load(units_of + 2 * item + 1)) * BLOCK
    if size == 8:
        _gather(row, first, tl.int64, BLOCK)
    elif size == 4:
        _gather(row, first, tl.int32, BLOCK)
    elif size == 2:
        _gather(row, first, tl.int16, BLOCK)
    else:
        _gather(row, first, tl.int8, BLOCK)


def filter_norms(weights: Sequence[Tensor], dims: Sequence[int], p: float, out: Tensor) -> None:
    """The p-norm (1, 2 or inf) of every filter of every weight, one tensor's after another, into `out`
    (float64). A dimension of -1: those of the slices of dimension 0 and of dimension 1, in one read.
    """
    counts = [
        int(w.shape[d] if d >= 0 else w.shape[0] + w.shape[1]) for w, d in zip(weights, dims, strict=True)
    ]
    parts = list(zip(weights, dims, out.split(counts), strict=True))
    pairs = [(weight, part) for weight, dim, part in parts if dim < 0]
    if pairs:
        from .groups import pair_norms

        places = [part.storage_offset() - out.storage_offset() for _, part in pairs]
        pair_norms([weight for weight, _ in pairs], p, out, places)
    rows, programs = [], 0
    for weight, dim, part in parts:
        if dim < 0:
            continue
        outer, filters, inner = split_at(weight, dim)
        first, programs = programs, programs + filters
        begin = int(part.storage_offset() - out.storage_offset())
        described = [outer * inner, max(inner, 1), _DTYPES[weight.dtype], weight.data_ptr(), begin - first]
        rows.append([programs, filters, *described])
    if programs == 0:
        return
    with device_of(out):
        norms_kernel[(programs,)](
            table(rows, out.device),
            out,
            NORM={1.0: 1, 2.0: 2, float("inf"): 0}[p],
            TENSORS=triton.next_power_of_2(len(rows)),
            ROW=ROW,
            BLOCK=sizes.FILTER_BLOCK,
            num_warps=sizes.FILTER_WARPS,
            **sizes.LAUNCH,
        )


def compact_filters(tensors: list[Tensor], keep: list[Tensor], dims: list[int]) -> tuple[list[Tensor], int]:
    """`tensors[i].index_select(dims[i], keep[i])` for all i, and -1. The indices have been checked."""
    outs = ops.new_compacted(tensors, keep, dims)
    rows, units_of, programs = [], [], 0
    for tensor, indices, dim, out in zip(tensors, keep, dims, outs, strict=True):
        outer, filters, inner = split_at(tensor, dim)
        row_bytes = inner * tensor.element_size()
        # The widest integer that divides a row and the addresses it starts from.
        bits = tensor.data_ptr() | out.data_ptr() | row_bytes | 8
        unit = bits & -bits
        units = outer * indices.numel() * (row_bytes // unit)
        units_of.append([unit, programs])
        programs += triton.cdiv(units, sizes.FILTER_BLOCK)
        pointers = [tensor.data_ptr(), out.data_ptr(), indices.data_ptr()]
        rows.append([programs, units, max(row_bytes // unit, 1), filters, max(indices.numel(), 1), *pointers])
    if programs == 0:
        return outs, -1
    with device_of(outs[0]):
        gather_kernel[(programs,)](
            table(rows, outs[0].device),
            torch.tensor(units_of, dtype=torch.int64, device=outs[0].device),
            TENSORS=triton.next_power_of_2(len(rows)),
            ROW=ROW,
            BLOCK=sizes.FILTER_BLOCK,
            num_warps=sizes.FILTER_WARPS,
            **sizes.LAUNCH,
        )
    return outs, -1


def split_at(tensor: Tensor, dim: int) -> tuple[int, int, int]:
    """[outer][dim][inner] of the storage of a dense tensor with any order of strides."""
    filters = tensor.shape[dim]
    if tensor.numel() == 0:
        return 0, filters, 0
    if filters == 1:  # its stride says nothing
        return 1, 1, tensor.numel()
    inner = tensor.stride(dim)
    return tensor.numel() // (filters * inner), filters, inner


def table(rows: list[list[int]], device: torch.device) -> Tensor:
    """The rows, padded to a power of two with rows that no program belongs to."""
    filled = [row + [0] * (ROW - len(row)) for row in rows]
    padding = [[torch.iinfo(torch.int64).max] * ROW] * (triton.next_power_of_2(len(rows)) - len(rows))
    return torch.tensor(filled + padding, dtype=torch.int64, device=device)


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
