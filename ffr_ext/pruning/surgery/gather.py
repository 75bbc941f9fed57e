"""`compact_filters`: the kept slices of a list of tensors, one kernel launch for the whole list."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import accumulate

import torch
from torch import Tensor

from ... import backends, ops
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
    sources = tensor_list("tensors", tensors)
    indices = tensor_list("keep", keep)
    if len(indices) != len(sources):
        raise ValueError(f"keep: expected one index tensor per tensor ({len(sources)}), got {len(indices)}")
    dims = dims_of("dim", dim, sources)
    if not ({k.dtype for k in indices} <= {torch.int64} and set(map(Tensor.dim, indices)) <= {1}):
        i, index = next((i, k) for i, k in enumerate(indices) if k.dtype != torch.int64 or k.ndim != 1)
        raise ValueError(f"keep[{i}]: expected a 1-D int64 tensor, got {index.dim()}-D {index.dtype}")
    no_grad = torch.no_grad() if any([t.requires_grad for t in sources]) else nullcontext()  # noqa: C419
    with no_grad:
        if _all_on_cpu(sources + indices):  # in the time of a few calls, whatever the number of tensors
            return _gather(sources, indices, dims, range(len(sources)), backend) if sources else []
        results: dict[int, Tensor] = {}
        for device in dict.fromkeys(t.device for t in sources):
            places = [i for i, t in enumerate(sources) if t.device == device]
            chosen = [sources[i] for i in places], [indices[i] for i in places], [dims[i] for i in places]
            results.update(zip(places, _gather(*chosen, places, backend), strict=True))
    return [results[i] for i in range(len(sources))]


def _gather(
    tensors: list[Tensor], keep: list[Tensor], dims: list[int], places: Sequence[int], backend: str
) -> list[Tensor]:
    """`compact_filters` of tensors of one device, which the caller's lists have at `places`."""
    device = tensors[0].device
    concrete = backends.resolve(backend, device)
    if concrete != "cpu":  # whose kernel looks at every index itself, without a wait or a sort
        _check_indices(keep, [t.shape[d] for t, d in zip(tensors, dims, strict=True)], places)
    here = _all_on_cpu(keep) if device.type == "cpu" else {k.device for k in keep} == {device}
    if not (here and all(map(Tensor.is_contiguous, keep))):
        moved = {id(index): index.to(device).contiguous() for index in keep}
        keep = [moved[id(index)] for index in keep]
    if concrete == "reference":
        return _by_torch(tensors, keep, dims)
    outs: list[Tensor]
    outs, wrong = ops.kernel("compact_filters", concrete)(dense(tensors), keep, dims)
    if wrong >= 0:
        _raise_for(places[wrong], keep[wrong], tensors[wrong].shape[dims[wrong]])
    return outs


def _all_on_cpu(tensors: list[Tensor]) -> bool:
    return all([t.is_cpu for t in tensors])  # noqa: C419  (a generator takes three times as long)


def _by_torch(tensors: list[Tensor], keep: list[Tensor], dims: list[int]) -> list[Tensor]:
    outs = ops.new_compacted(tensors, keep, dims)
    for tensor, index, dim, out in zip(tensors, keep, dims, outs, strict=True):
        torch.index_select(tensor, dim, index, out=out)
    return outs


def _check_indices(keep: Sequence[Tensor], sizes: Sequence[int], places: Sequence[int]) -> None:
    """All index tensors of a device in a few operators and one look at the result: a network has hundreds, and on a
    GPU every look waits. Which one is wrong, and how, is looked up only when one is.
    """
    # By device, and once for every (id of an index tensor, size): its first number in the list.
    by_device: dict[torch.device, dict[tuple[int, int], int]] = {}
    for i, (index, size) in enumerate(zip(keep, sizes, strict=True)):
        by_device.setdefault(index.device, {}).setdefault((id(index), size), i)
    for numbers in by_device.values():
        members = list(numbers.values())
        if not _in_range_and_unique([keep[i] for i in members], [sizes[i] for i in members]):
            for i in members:
                _raise_for(places[i], keep[i], sizes[i])


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


def _raise_for(place: int, index: Tensor, size: int) -> None:
    """Raise if these indices are wrong, and say how."""
    if index.numel() == 0:
        return
    ordered = index.sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if repeated.numel():
        raise ValueError(f"keep[{place}]: expected unique indices, got {int(repeated[0])} more than once")
    low, high = int(ordered[0]), int(ordered[-1])
    if low < 0 or high >= size:
        raise IndexError(f"keep[{place}]: expected indices in [0, {size}), got {low if low < 0 else high}")
