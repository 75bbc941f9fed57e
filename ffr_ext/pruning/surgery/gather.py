"""`compact_filters`: the kept slices of a list of tensors, one kernel launch for the whole list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ... import backends, ops
from ...models import OUT_OF_MEMORY
from ..norms import dense, dims_of, tensor_list


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
    tensors, keep, dim = _reusable(tensors), _reusable(keep), _reusable(dim)
    if backend in ("auto", "cpu") and backends.native() is not None:
        # Checked natively. What that refuses (other devices, gaps, anything wrong) is sorted out below, where the
        # errors speak of the caller's arguments.
        try:
            with torch.no_grad():
                dims = [dim] * len(tensors) if type(dim) is int else dims_of("dim", dim, tensors)
                return ops.compacted(tensors, keep, dims)
        except OUT_OF_MEMORY:
            raise
        except (TypeError, ValueError, IndexError, RuntimeError):
            pass
    sources = tensor_list("tensors", tensors)
    indices = tensor_list("keep", keep)
    if len(indices) != len(sources):
        raise ValueError(f"keep: expected one index tensor per tensor ({len(sources)}), got {len(indices)}")
    dims = dims_of("dim", dim, sources)
    for i, index in enumerate(indices):
        if index.dtype != torch.int64 or index.dim() != 1:
            raise ValueError(f"keep[{i}]: expected a 1-D int64 tensor, got {index.dim()}-D {index.dtype}")
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(sources):
        by_device.setdefault(tensor.device, []).append(i)
    results: dict[int, Tensor] = {}
    for members in by_device.values():
        chosen = [sources[i] for i in members], [indices[i] for i in members], [dims[i] for i in members]
        results.update(zip(members, _gather(*chosen, backend), strict=True))
    return [results[i] for i in range(len(sources))]


def _reusable(items: Any) -> Any:
    """`items`, in a list if they are an iterator, which gives them only once."""
    return list(items) if isinstance(items, Iterator) else items


@torch.no_grad()
def _gather(sources: list[Tensor], keep: list[Tensor], dims: list[int], backend: str) -> list[Tensor]:
    """`compact_filters` of tensors of one device."""
    device = sources[0].device
    concrete = backends.resolve(backend, device.type)
    if concrete != "cpu":  # whose kernel looks at every index itself, without a wait or a sort
        _check_indices(keep, [t.shape[d] for t, d in zip(sources, dims, strict=True)])
    if not all(index.device == device and index.is_contiguous() for index in keep):
        moved = {id(index): index.to(device).contiguous() for index in keep}
        keep = [moved[id(index)] for index in keep]
    if concrete == "reference":
        return ops.compacted_by_torch(sources, keep, dims)
    outs = ops.new_compacted(sources, keep, dims)
    ready = [source if source.is_contiguous() else dense(source) for source in sources]
    try:
        ops.filter_kernels(concrete).compact(ready, keep, dims, outs)
    except RuntimeError:
        _check_indices(keep, [t.shape[d] for t, d in zip(sources, dims, strict=True)])
        raise
    return outs


def _check_indices(indices: Sequence[Tensor], sizes: Sequence[int]) -> None:
    """All index tensors of a device in a few operators and one look at the result: a network has hundreds, and on a
    GPU every look waits. Which one is wrong, and how, is looked up only when one is.
    """
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
