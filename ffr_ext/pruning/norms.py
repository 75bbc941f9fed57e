"""`filter_norms`: the norm of every filter of a list of weights, one kernel launch for the whole list."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .. import backends, ops

NORM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def filter_norms(
    weights: Sequence[Tensor], p: float = 2, dim: int | Sequence[int] = 0, *, backend: str = "auto"
) -> list[Tensor]:
    """The p-norm of every slice along ``dim`` of every tensor in ``weights``, in one launch.

    Equal to, for each weight w::

        torch.linalg.vector_norm(w.float(), p, dim=[d for d in range(w.dim()) if d != dim])

    but accumulated in float64 and with one kernel for the list.

    Args:
        weights: Dense tensors of any shapes, float16, bfloat16, float32 or float64, mixed as they come.
        p: 1, 2 or ``math.inf``.
        dim: The dimension whose slices are the filters: 0 for the out-filters of a convolution or linear
            layer, 1 for in-channels. One number for all, or one per weight.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        One 1-D tensor of ``w.shape[dim]`` norms per weight, on its device; float64 for float64 weights, else
        float32. Not differentiable. Those of one device are views of one tensor: clone what is changed or kept long.

    Raises:
        TypeError: ``weights`` is not a sequence of tensors, or ``dim`` no whole number or sequence of them.
        ValueError: another p, a dtype that is not listed, a ``dim`` that a weight does not have.
    """
    tensors = tensor_list("weights", weights)
    dims = dims_of("dim", dim, tensors)
    for index, weight in enumerate(tensors):
        if weight.dtype not in NORM_DTYPES:
            raise ValueError(
                f"weights[{index}]: expected dtype float16, bfloat16, float32 or float64, got {weight.dtype}"
            )
    return norms_along(tensors, p, dims, backend)


def norms_along(tensors: list[Tensor], p: float, dims: list[int], backend: str) -> list[Tensor]:
    """`filter_norms` of checked tensors and dimensions. A dimension of -1: the norms of the slices of dimension 0, and
    behind them those of dimension 1, in one read.
    """
    if isinstance(p, bool) or p not in (1, 2, math.inf):
        raise ValueError(f"p: expected 1, 2 or inf, got {p!r}")
    results: dict[int, Tensor] = {}
    with torch.no_grad():
        for device in dict.fromkeys(w.device for w in tensors):
            members = [i for i, w in enumerate(tensors) if w.device == device]
            chosen = backends.resolve(backend, device)
            on_device, on_dims = [tensors[i] for i in members], [dims[i] for i in members]
            results.update(zip(members, _norms(on_device, on_dims, float(p), chosen), strict=True))
    return [results[i] for i in range(len(tensors))]


def _norms(weights: list[Tensor], dims: list[int], p: float, backend: str) -> list[Tensor]:
    if backend == "reference":
        return [_reference_norms(w, d, p) for w, d in zip(weights, dims, strict=True)]
    counts = [w.shape[d] if d >= 0 else w.shape[0] + w.shape[1] for w, d in zip(weights, dims, strict=True)]
    out = torch.empty(sum(counts), dtype=torch.float64, device=weights[0].device)
    ops.kernel("filter_norms", backend)(dense(weights), dims, p, out)
    # One conversion for all: a network has hundreds of weights, and its biases are done in less time than one call.
    by_dtype = {dtype: out.to(dtype).split(counts) for dtype in {_result_dtype(w) for w in weights}}
    return [by_dtype[_result_dtype(w)][i] for i, w in enumerate(weights)]


def _reference_norms(weight: Tensor, dim: int, p: float) -> Tensor:
    if dim < 0:
        return torch.cat([_reference_norms(weight, d, p) for d in (0, 1)])
    filters = weight.detach().movedim(dim, 0).double()
    rest = list(range(1, filters.dim()))
    if not rest:
        norms = filters.abs()
    elif filters.numel() == 0:
        norms = filters.new_zeros(filters.shape[0])
    else:
        norms = torch.linalg.vector_norm(filters, p, dim=rest)
    return norms.to(_result_dtype(weight))


def _result_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def dims_of(name: str, dim: int | Sequence[int], tensors: Sequence[Tensor]) -> list[int]:
    """One non-negative dimension per tensor, or ValueError naming the tensor that lacks it."""
    if type(dim) is int and tensors and 0 <= dim < min(map(Tensor.dim, tensors)):
        return [dim] * len(tensors)
    if _is_whole(dim):
        dims: list[Any] = [int(dim)] * len(tensors)  # type: ignore[arg-type]
    elif isinstance(dim, Iterable) and not isinstance(dim, str | Tensor):
        dims = list(dim)
        for index, d in enumerate(dims):
            if not _is_whole(d):
                raise TypeError(f"{name}[{index}]: expected a whole number, got {d!r}")
        dims = list(map(int, dims))
    else:
        raise TypeError(f"{name}: expected a whole number, or one per tensor, got {dim!r}")
    if len(dims) != len(tensors):
        raise ValueError(f"{name}: expected one number, or one per tensor ({len(tensors)}), got {len(dims)}")
    counts = list(map(Tensor.dim, tensors))
    for index, (d, count) in enumerate(zip(dims, counts, strict=True)):
        if not -count <= d < count:
            shape = tuple(tensors[index].shape)
            raise ValueError(f"{name}: {d} is no dimension of tensor {index} of shape {shape}")
    return [d % count for d, count in zip(dims, counts, strict=True)]


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def tensor_list(name: str, tensors: Any) -> list[Tensor]:
    """`tensors` as a list, or TypeError naming the argument and the index."""
    if type(tensors) is list:
        listed = tensors
    elif isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a sequence of tensors, got one Tensor; pass [tensor]")
    elif not isinstance(tensors, Iterable):
        raise TypeError(f"{name}: expected a sequence of tensors, got {type(tensors).__name__}")
    else:
        listed = list(tensors)
    # In calls that loop in C: hundreds of tensors are checked in the time of a few.
    if all(map(isinstance, listed, repeat(Tensor))) and {t.layout for t in listed} <= {torch.strided}:
        return listed
    for index, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{index}]: expected a Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{index}]: expected a dense (strided) tensor, got layout {tensor.layout}")
    return listed


def dense(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, those with gaps or overlaps copied without: their dimensions keep the order in memory."""
    if all(map(Tensor.is_contiguous, tensors)):
        return tensors
    return [_dense(tensor) for tensor in tensors]


def _dense(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() or (
        tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    ):
        return tensor
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    ordered = tensor.permute(order)
    if ordered.is_contiguous():
        return tensor
    return ordered.contiguous().permute([order.index(d) for d in range(len(order))])
