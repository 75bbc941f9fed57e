"""`compact_filters`: the kept slices of a list of tensors, one kernel launch for the whole list."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .. import backends, ops
from .layout import as_contiguous, empty_in_order, permuted, tensor_list
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
    outs = [permuted(r, order) for r, order in zip(results, orders, strict=True)]
    ops.filter_kernels(backend).compact(
        list(dense), keep, [order.index(d) for order, d in zip(orders, dims, strict=True)], outs
    )


def _check_indices(indices: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """All index tensors of a device in a few operators and one look at the result: a network has hundreds, and on a
    GPU every look waits. Which one is wrong, and how, is looked up only when one is.
    """
    for i, index in enumerate(indices):
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(f"keep[{i}]: expected a 1-D int64 tensor, got {index.dim()}-D {index.dtype}")
    # By device, and once for every (id of an index tensor, size): its first place in the list.
    by_device: dict[torch.device, dict[tuple[int, int], int]] = {}
    for i, (index, size) in enumerate(zip(indices, sizes, strict=True)):
        by_device.setdefault(index.device, {}).setdefault((id(index), size), i)
    for places in by_device.values():
        members = list(places.values())
        if not _in_range_and_unique([indices[i] for i in members], [sizes[i] for i in members]):
            for i in members:
                _raise_if_wrong(i, indices[i], sizes[i])


def _in_range_and_unique(indices: Sequence[Tensor], sizes: Sequence[int]) -> bool:
    device = indices[0].device
    counts = torch.tensor([index.numel() for index in indices], device=device)
    size, first = torch.tensor([sizes, [0, *accumulate(sizes)][:-1]], device=device)
    flat = torch.cat(list(indices))
    each = {"output_size": flat.numel()}
    inside = (flat >= 0) & (flat < size.repeat_interleave(counts, **each))
    # A place for every index of every tensor; one past the last for indices that are out of range.
    places = torch.where(inside, flat + first.repeat_interleave(counts, **each), sum(sizes))
    taken = torch.zeros(sum(sizes) + 1, dtype=torch.bool, device=device)
    taken[places] = True
    return bool(inside.all() & (taken.sum() == flat.numel()))


def _raise_if_wrong(i: int, index: Tensor, size: int) -> None:
    if index.numel() == 0:
        return
    ordered = index.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"keep[{i}]: expected unique indices, got {int(repeated[0])} more than once")
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= size:
        raise IndexError(f"keep[{i}]: expected indices in [0, {size}), got {low if low < 0 else high}")
