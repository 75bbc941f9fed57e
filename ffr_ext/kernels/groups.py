"""Launches of the kernels for rows and columns of weights: the norms of both in one read, `add_scaled_`, `shrink_`.

One launch for the tensors of a dtype, described by a table as in `filters`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sizes
from .filters import ROW, device_of, split_at, table
from .groups_kernels import add_pairs_kernel, pair_norms_kernel, scale_kernel

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class _Matrix(NamedTuple):
    """A dense tensor as a matrix of runs: see `groups_kernels`."""

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
