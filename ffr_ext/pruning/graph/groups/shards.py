"""The part of a tensor that lives on this rank: all of it, or its rows where FSDP2 has sharded it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Local:
    """A tensor's part on this rank.

    Attributes:
        tensor: Shares memory with the whole: writing to it writes there.
        first_row: Where its rows begin among those of the whole.
        mesh: The ranks that hold all parts; None for a plain tensor.
        counts: False where another rank holds the same and adds it to sums over ranks.
    """

    tensor: Tensor
    first_row: int = 0
    mesh: Any = None
    counts: bool = True


def local_parts(tensors: Iterable[Tensor]) -> list[Local]:
    """The parts of plain tensors and DTensors; what several ranks hold whole counts on the first of them alone.

    ValueError for a DTensor sharded otherwise than by rows (`Shard(0)`).
    """
    parts = [_local_part(tensor) for tensor in tensors]
    mesh = next((p.mesh for p in parts if p.mesh is not None), None)
    if mesh is None:
        return parts
    first = mesh.get_rank() == int(mesh.mesh.flatten()[0])
    return [replace(p, counts=first) if p.mesh is None else p for p in parts]


def _local_part(tensor: Tensor) -> Local:
    if not _is_distributed(tensor):
        return Local(tensor.detach())
    whole: Any = tensor.detach()
    mesh, placements = whole.device_mesh, whole.placements
    sharded = [d for d, p in enumerate(placements) if p.is_shard(0)]
    if len(sharded) > 1 or not all(p.is_shard(0) or p.is_replicate() for p in placements):
        raise ValueError(
            f"model: a parameter has the placements {placements}; expected one Shard(0), as fully_shard makes it"
        )
    holders = [mesh.get_local_rank(d) for d in range(mesh.ndim) if d not in sharded]
    row = 0
    for dim in sharded:
        chunk = -(-whole.shape[0] // mesh.size(dim))  # as torch.chunk
        row = min(chunk * mesh.get_local_rank(dim), whole.shape[0])
    return Local(whole.to_local(), row, mesh, not any(holders))


def sum_over_ranks(total: Tensor, parts: Iterable[Local]) -> Tensor:
    """`total` added up over the ranks of the parts' mesh, in place; as it is where no part is sharded."""
    return _reduce(total, parts, "SUM")


def max_over_ranks(largest: Tensor, parts: Iterable[Local]) -> Tensor:
    """The largest of each entry, likewise."""
    return _reduce(largest, parts, "MAX")


def _reduce(values: Tensor, parts: Iterable[Local], operation: str) -> Tensor:
    mesh = next((p.mesh for p in parts if p.mesh is not None), None)
    if mesh is not None:
        for dim in range(mesh.ndim):
            kind = getattr(torch.distributed.ReduceOp, operation)
            torch.distributed.all_reduce(values, kind, group=mesh.get_group(dim))
    return values


def _is_distributed(tensor: Tensor) -> bool:
    # Its import takes a second, and where a DTensor exists it has been imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
