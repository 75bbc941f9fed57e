"""`compact_filters`: the kept slices of a list of tensors, one kernel launch for the whole list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, ops
from .layout import as_contiguous, empty_in_order, stride_order, tensor_list
from .norms import dims_of


def compact_filters(
    tensors: Sequence[Tensor], keep: Sequence[Tensor], dim: int | Sequence[int] = 0, *, backend: str = "auto"
) -> list[Tensor]:
    """The slices ``keep[i]`` of ``tensors[i]`` along ``dim``, in one launch.

    Equal to ``[t.index_select(dim, k) for t, k in zip(tensors, keep)]``, except that each result keeps the
    memory format of its tensor (channels_last weights stay channels_last).

    Args:
        tensors: Tensors of any shapes, dtypes and dense layouts, mixed as they come (weights, biases,
            buffers, gradients, optimizer state).
        keep: One 1-D int64 tensor per tensor: unique indices in range, in the order wanted. One index tensor
            may serve many tensors; it is checked once and moved to the device once.
        dim: The dimension to select along: one number for all, or one per tensor.
        backend: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``.

    Returns:
        New tensors. Not differentiable: they never require grad.

    Raises:
        TypeError: an argument is not a sequence of tensors.
        ValueError: ``keep`` is not 1-D int64, has a duplicate, or is not one per tensor; ``dim`` does not
        exist.
        IndexError: an index is negative or too large.
        All are raised before anything is computed.
    """
    sources = tensor_list("tensors", tensors)
    indices = tensor_list("keep", keep)
    if len(indices) != len(sources):
        raise ValueError(f"keep: expected one index tensor per tensor ({len(sources)}), got {len(indices)}")
    dims = dims_of("dim", dim, sources)
    _check_indices(indices, [t.shape[d] for t, d in zip(sources, dims, strict=True)])
    moved: dict[tuple[int, torch.device], Tensor] = {}
    results: list[Tensor] = []
    with torch.no_grad():
        for tensor, index, d in zip(sources, indices, dims, strict=True):
            shape = list(tensor.shape)
            shape[d] = index.numel()
            results.append(empty_in_order(tensor, shape))
            if (id(index), tensor.device) not in moved:
                moved[id(index), tensor.device] = index.to(tensor.device).contiguous()
        for device in dict.fromkeys(t.device for t in sources):
            members = [i for i, t in enumerate(sources) if t.device == device]
            _gather(
                [sources[i] for i in members],
                [moved[id(indices[i]), device] for i in members],
                [dims[i] for i in members],
                [results[i] for i in members],
                backends.resolve(backend, device.type),
            )
    return results


def _gather(
    sources: list[Tensor], keep: list[Tensor], dims: list[int], results: list[Tensor], backend: str
) -> None:
    if backend == "reference":
        for source, index, dim, result in zip(sources, keep, dims, results, strict=True):
            torch.index_select(source.detach(), dim, index, out=result)
        return
    dense, orders = zip(*(as_contiguous(t) for t in sources), strict=True)
    # The result was allocated in the order of its tensor, so the same permutation makes it contiguous, as a
    # view.
    outs = [r.permute(stride_order(t)) for r, t in zip(results, sources, strict=True)]
    ops.filter_kernels(backend).compact(
        list(dense), keep, [order.index(d) for order, d in zip(orders, dims, strict=True)], outs
    )


def _check_indices(indices: Sequence[Tensor], sizes: Sequence[int]) -> None:
    bounds: dict[int, tuple[int, int]] = {}  # id of an index tensor -> its smallest and largest index
    for i, (index, size) in enumerate(zip(indices, sizes, strict=True)):
        if id(index) not in bounds:
            bounds[id(index)] = _check_index(i, index)
        low, high = bounds[id(index)]
        if low < 0 or high >= size:
            raise IndexError(f"keep[{i}]: expected indices in [0, {size}), got {low if low < 0 else high}")


def _check_index(i: int, index: Tensor) -> tuple[int, int]:
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"keep[{i}]: expected a 1-D int64 tensor, got {index.dim()}-D {index.dtype}")
    if index.numel() == 0:
        return 0, -1
    ordered = index.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"keep[{i}]: expected unique indices, got {int(repeated[0])} more than once")
    return int(ordered[0]), int(ordered[-1])
