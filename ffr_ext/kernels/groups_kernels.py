"""Triton's device code for rows and columns of weights: the norms of both, what is added up of them, and scaling.

The storage of a dense tensor is [outer][first][middle][second][inner] for one of the orders (rows, columns) and
(columns, rows): a matrix of runs, each in one slice of `first`, whose columns belong to slices of `second`. A program
takes a tile of it, so an index is divided once for a run and once for a column of the tile, not for every element.
"""

import triton
import triton.language as tl

from .filters import owner


@triton.jit
def _place(tile, across):
    """Of a tile, the ones above and beside it. Divided in 32 bits: in 64 it is a call with a stack."""
    down = tile.to(tl.int32) // across.to(tl.int32)
    return down.to(tl.int64), tile - down * across


@triton.jit
def _larger(a, b):
    return tl.where((a > b) | (a != a), a, b)  # NaN if either is; tl.maximum's is longer in float64


@triton.jit
def _combine(a, b, NORM: tl.constexpr):
    if NORM == 0:
        return _larger(a, b)
    return a + b


@triton.jit
def _along(values, AXIS: tl.constexpr, NORM: tl.constexpr):
    if NORM == 0:
        return tl.reduce(values, AXIS, _larger)  # tl.max drops NaN
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
            tl.multiple_of(tl.load(row + 2), VEC),  # of `columns` it would hold in the other branch too
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
            tl.multiple_of(tl.load(row + 2), VEC),  # of `columns` it would hold in the other branch too
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
