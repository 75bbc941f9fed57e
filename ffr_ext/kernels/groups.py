"""Triton's kernels for rows and columns of weights: the norms of both in one read, `add_scaled_` and `shrink_`.

The storage of a dense tensor is [outer][first][middle][second][inner] for one of the orders (rows, columns) and
(columns, rows): a matrix of runs, each in one slice of `first`, whose columns belong to slices of `second`. A program
takes a tile of it, so an index is divided once for a run and once for a column of the tile, not for every element. One
launch for the tensors of a dtype, described by a table as in `filters`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sizes
from .filters import ROW, device_of, owner, split_at, table

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _place(tile, across):
    """Of a tile, the ones above and beside it. Divided in 32 bits: in 64 it is a call with a stack."""
    down = tile.to(tl.int32) // across.to(tl.int32)
    return down.to(tl.int64), tile - down * across


@triton.jit
def _combine(a, b, NORM: tl.constexpr):
    if NORM == 0:
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    return a + b


@triton.jit
def _along(values, AXIS: tl.constexpr, NORM: tl.constexpr):
    if NORM == 0:
        # tl.max drops NaN; the sum of what is NaN is NaN, of the rest 0.
        return tl.max(values, AXIS) + tl.sum(tl.where(values != values, values, 0.0), AXIS)
    return tl.sum(values, AXIS)


@triton.jit
def _norms_of_tile(
    data,
    sums,
    tile_sums,
    first_run,
    first_column,
    runs,
    columns,
    NORM: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    column = first_column + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float64)
    for part in range(PARTS):  # unrolled, its loads would fill all registers
        run = first_run + part * ROWS + tl.arange(0, ROWS)
        mask = (run < runs)[:, None] & (column < columns)[None, :]
        value = tl.abs(
            tl.load(data + run[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float64)
        )
        if NORM == 2:
            value = value * value
        tl.store(sums + run, _along(value, 1, NORM), mask=run < runs)
        total = _combine(total, value, NORM)
    tl.store(tile_sums + column, _along(total, 0, NORM), mask=column < columns)


@triton.jit
def pair_norms_kernel(
    items,
    sums,
    NORM: tl.constexpr,
    TYPE: tl.constexpr,
    VEC: tl.constexpr,
    TENSORS: tl.constexpr,
    ROW: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Sums of each run in each tile, and of each column in each: [across][runs], then [down][columns]."""
    program = tl.program_id(0).to(tl.int64)
    row = items + owner(items, program, TENSORS, ROW) * ROW
    runs = tl.load(row + 1)
    columns = tl.load(row + 2)
    across = tl.load(row + 3)
    tile = program - tl.load(row + 4)
    address = tl.load(row + 5)
    sums += tl.load(row + 6)
    down, beside = _place(tile, across)
    of_columns = sums + across * runs + down * columns
    of_runs = sums + beside * runs
    first_run = down * (PARTS * ROWS)
    first_column = beside * COLS
    if tl.load(row + 7) == 1:  # whole accesses: every run begins at one
        _norms_of_tile(
            tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16),
            of_runs,
            of_columns,
            first_run,
            tl.multiple_of(first_column, COLS),
            runs,
            tl.multiple_of(columns, VEC),
            NORM,
            PARTS,
            ROWS,
            COLS,
        )
    else:
        _norms_of_tile(
            address.to(tl.pointer_type(TYPE)),
            of_runs,
            of_columns,
            first_run,
            first_column,
            runs,
            columns,
            NORM,
            PARTS,
            ROWS,
            COLS,
        )


@triton.jit
def add_pairs_kernel(
    items, sums, out, NORM: tl.constexpr, TENSORS: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """One program for each slice: adds up what the tiles have left of it."""
    program = tl.program_id(0).to(tl.int64)
    row = items + owner(items, program, TENSORS, ROW) * ROW
    each = tl.load(row + 1)  # addends
    step = tl.load(row + 2)  # from one addend of a group to the next group's
    group = tl.load(row + 3)  # addends that lie side by side
    slice = program - tl.load(row + 4)
    sums += tl.load(row + 5) + slice * group
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, each, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        value = tl.load(sums + i // group * step + i % group, mask=i < each, other=0.0)
        total = _combine(total, value, NORM)
    norm = _along(total, 0, NORM)
    if NORM == 2:
        norm = tl.sqrt(norm)
    tl.store(out + tl.load(row + 6) + slice, norm)


@triton.jit
def _scale_tile(
    weight,
    grad,
    first,
    second,
    first_run,
    first_column,
    runs,
    columns,
    middle,
    firsts,
    inner,
    slope,
    tau,
    SHRINK: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    run = first_run + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLS)
    mask = (run < runs)[:, None] & (column < columns)[None, :]
    offset = run[:, None] * columns + column[None, :]
    x = tl.load(weight + offset, mask=mask, other=0.0)
    target = grad
    if SHRINK:
        target = weight
        old = x
    else:
        old = tl.load(grad + offset, mask=mask, other=0.0)
    # An address of 0: there are no such factors, and nothing is read.
    none = 1.0 if SHRINK else 0.0
    of_runs = first.to(tl.pointer_type(COMPUTE)) + run // middle % firsts
    of_columns = second.to(tl.pointer_type(COMPUTE)) + column // inner
    u = tl.load(of_runs, mask=run < tl.where(first == 0, 0, runs), other=none)
    v = tl.load(of_columns, mask=column < tl.where(second == 0, 0, columns), other=none)
    w = x.to(COMPUTE)
    if SHRINK:
        w = w * (u[:, None] * v[None, :])
        result = tl.where(tl.abs(w) <= tau, 0.0, w)
    else:
        factor = u[:, None] + v[None, :] + tl.where(tl.abs(w) <= tau, slope, 0.0)
        result = old.to(COMPUTE) + w * factor
    tl.store(target + offset, result.to(x.dtype), mask=mask)


@triton.jit
def scale_kernel(
    items,
    numbers,  # slope and tau of each tensor, in the compute dtype
    SHRINK: tl.constexpr,
    TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
    TENSORS: tl.constexpr,
    ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    item = owner(items, program, TENSORS, ROW)
    row = items + item * ROW
    runs = tl.load(row + 1)
    columns = tl.load(row + 2)
    across = tl.load(row + 3)
    tile = program - tl.load(row + 4)
    weight = tl.load(row + 5)
    grad = tl.load(row + 6)
    first = tl.load(row + 8)
    second = tl.load(row + 9)
    firsts = tl.load(row + 10)
    middle = tl.load(row + 11)
    inner = tl.load(row + 12)
    slope = tl.load(numbers + 2 * item)
    tau = tl.load(numbers + 2 * item + 1)
    down, beside = _place(tile, across)
    first_run = down * ROWS
    first_column = beside * COLS
    if tl.load(row + 7) == 1:
        _scale_tile(
            tl.multiple_of(weight.to(tl.pointer_type(TYPE)), 16),
            tl.multiple_of(grad.to(tl.pointer_type(TYPE)), 16),
            first,
            second,
            first_run,
            tl.multiple_of(first_column, COLS),
            runs,
            tl.multiple_of(columns, VEC),
            middle,
            firsts,
            inner,
            slope,
            tau,
            SHRINK,
            COMPUTE,
            ROWS,
            COLS,
        )
    else:
        _scale_tile(
            weight.to(tl.pointer_type(TYPE)),
            grad.to(tl.pointer_type(TYPE)),
            first,
            second,
            first_run,
            first_column,
            runs,
            columns,
            middle,
            firsts,
            inner,
            slope,
            tau,
            SHRINK,
            COMPUTE,
            ROWS,
            COLS,
        )


class _Matrix(NamedTuple):
    """A dense tensor as a matrix of runs: see the top of the file."""

    outer: int
    first: int
    middle: int
    second: int
    inner: int
    rows_first: bool

    @property
    def runs(self) -> int:
        return self.outer * self.first * self.middle

    @property
    def columns(self) -> int:
        return self.second * self.inner

    @classmethod
    def of(cls, tensor: Tensor) -> "_Matrix":
        outer, rows, inner = split_at(tensor, 0)
        outer_1, columns, inner_1 = split_at(tensor, 1) if tensor.dim() > 1 else (1, 1, 1)
        if tensor.numel() == 0:
            return cls(0, rows, 1, columns, 1, True)
        # With slices of one dimension alone, they are the columns: a run may then be the whole tensor.
        if columns == 1:
            return cls(outer, 1, 1, rows, inner, False)
        if rows == 1:
            return cls(outer_1, 1, 1, columns, inner_1, True)
        if inner > inner_1:
            return cls(outer, rows, inner // (columns * inner_1), columns, inner_1, True)
        return cls(outer_1, columns, inner_1 // (rows * inner), rows, inner, False)

    def tiles(self, tile: tuple[int, int], parts: int = 1) -> tuple[int, int]:
        """Programs below and beside each other, each taking `parts` tiles (rows, columns) below each other."""
        return triton.cdiv(self.runs, tile[0] * parts), triton.cdiv(self.columns, tile[1])

    def whole(self, tensors: Sequence[Tensor]) -> bool:
        """Whether every run of the tensors begins at a whole access."""
        sizes_fit = self.columns * tensors[0].element_size() % sizes.ACCESS_BYTES == 0
        return sizes_fit and all(t.data_ptr() % sizes.ACCESS_BYTES == 0 for t in tensors)


def pair_norms(weights: Sequence[Tensor], p: float, out: Tensor, begins: Sequence[int]) -> None:
    """The p-norms of the rows of each tensor, and behind them those of its columns, from `begins` on into `out`
    (float64).
    """
    if not weights:
        return
    norm = {1.0: 1, 2.0: 2, float("inf"): 0}[p]
    matrices = [_Matrix.of(w) for w in weights]
    tiles_of = [
        m.tiles(sizes.pair_tile(w.dtype), sizes.PAIR_PARTS) for m, w in zip(matrices, weights, strict=True)
    ]
    left, places = [], 0  # where each tensor's tiles leave their sums
    for matrix, (down, across) in zip(matrices, tiles_of, strict=True):
        left.append(places)
        places += across * matrix.runs + down * matrix.columns
    device = weights[0].device
    sums = torch.empty(places, dtype=torch.float64, device=device)
    with device_of(weights[0]):
        for dtype in dict.fromkeys(w.dtype for w in weights):
            rows, programs = [], 0
            for weight, matrix, (down, across), begin in zip(weights, matrices, tiles_of, left, strict=True):
                if weight.dtype == dtype and weight.numel():
                    first, programs = programs, programs + down * across
                    whole = int(matrix.whole([weight]))
                    where = [weight.data_ptr(), begin, whole]
                    rows.append([programs, matrix.runs, matrix.columns, across, first, *where])
            if programs:
                vec = sizes.vector_length(dtype)
                pair_norms_kernel[(programs,)](
                    table(rows, device),
                    sums,
                    NORM=norm,
                    TYPE=_TYPES[dtype],
                    VEC=vec,
                    TENSORS=triton.next_power_of_2(len(rows)),
                    ROW=ROW,
                    PARTS=sizes.PAIR_PARTS,
                    ROWS=sizes.pair_tile(dtype)[0],
                    COLS=sizes.pair_tile(dtype)[1],
                    num_warps=sizes.PAIR_WARPS,
                    **sizes.LAUNCH,
                )
        _add_pairs(matrices, tiles_of, left, sums, out, begins, norm)


def _add_pairs(
    matrices: Sequence[_Matrix],
    tiles_of: Sequence[tuple[int, int]],
    left: Sequence[int],
    sums: Tensor,
    out: Tensor,
    begins: Sequence[int],
    norm: int,
) -> None:
    rows, programs = [], 0
    for matrix, (down, across), begin, place in zip(matrices, tiles_of, left, begins, strict=True):
        firsts, seconds = place, place + matrix.first
        if not matrix.rows_first:
            firsts, seconds = place + matrix.second, place
        side_by_side = max(matrix.middle, 1)
        for slices, each, step, group, where, target in (
            (
                matrix.first,
                across * matrix.outer * side_by_side,
                matrix.first * side_by_side,
                side_by_side,
                begin,
                firsts,
            ),
            (
                matrix.second,
                down * matrix.inner,
                matrix.columns,
                matrix.inner,
                begin + across * matrix.runs,
                seconds,
            ),
        ):
            if slices:
                first, programs = programs, programs + slices
                rows.append([programs, each, step, group, first, where, target])
    if programs:
        add_pairs_kernel[(programs,)](
            table(rows, sums.device),
            sums,
            out,
            NORM=norm,
            TENSORS=triton.next_power_of_2(len(rows)),
            ROW=ROW,
            BLOCK=sizes.PAIR_BLOCK,
            num_warps=1,
            **sizes.LAUNCH,
        )


def add_scaled_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    slopes: Sequence[float],
    taus: Sequence[float],
) -> None:
    """G[o, i, k] += W[o, i, k] (r[o] + q[i] + slope [|W| <= tau]). Grads lie as their weights do."""
    _scale(weights, grads, rows, columns, slopes, taus, shrink=False)


def shrink_(
    weights: Sequence[Tensor], rows: Sequence[Tensor], columns: Sequence[Tensor], taus: Sequence[float]
) -> None:
    """W[o, i, k] *= r[o] q[i], then 0 where |W| <= tau."""
    _scale(weights, weights, rows, columns, [0.0] * len(weights), taus, shrink=True)


def _scale(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    slopes: Sequence[float],
    taus: Sequence[float],
    shrink: bool,
) -> None:
    for dtype in dict.fromkeys(w.dtype for w in weights):
        vec, items, numbers, programs = sizes.vector_length(dtype), [], [], 0
        for weight, grad, r, q, slope, tau in zip(weights, grads, rows, columns, slopes, taus, strict=True):
            if weight.dtype != dtype or weight.numel() == 0:
                continue
            matrix = _Matrix.of(weight)
            down, across = matrix.tiles(sizes.pair_tile(dtype))
            first, programs = programs, programs + down * across
            factors = [side.data_ptr() if side.numel() else 0 for side in (r, q)]
            if not matrix.rows_first:
                factors.reverse()
            whole = int(matrix.whole([weight, grad]))
            where = [weight.data_ptr(), grad.data_ptr(), whole, *factors]
            shape = [int(size) for size in (matrix.first, matrix.middle, matrix.inner)]
            items.append([programs, matrix.runs, matrix.columns, across, first, *where, *shape])
            numbers.append([slope, tau])
        if not programs:
            continue
        device, wide = weights[0].device, dtype == torch.float64
        with device_of(weights[0]):
            scale_kernel[(programs,)](
                table(items, device),
                torch.tensor(numbers, dtype=torch.float64 if wide else torch.float32, device=device),
                SHRINK=shrink,
                TYPE=_TYPES[dtype],
                COMPUTE=tl.float64 if wide else tl.float32,
                VEC=vec,
                TENSORS=triton.next_power_of_2(len(items)),
                ROW=ROW,
                ROWS=sizes.pair_tile(dtype)[0],
                COLS=sizes.pair_tile(dtype)[1],
                num_warps=sizes.PAIR_WARPS,
                **sizes.LAUNCH,
            )
