"""Cuts: which indices of a dimension are kept, and tensors with their cuts made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .gather import compact_filters

if TYPE_CHECKING:
    from .merges import Merge


class CutError(ValueError):
    """The plan does not fit what it is applied to."""


@dataclass(frozen=True)
class Cut:
    """The kept indices of one dimension. For the input dimension of a grouped convolution one list per kept
    group: each group keeps its own inputs."""

    dim: int
    keep: Sequence[int] | None = None
    groups: Sequence[Sequence[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        if self.groups is not None:
            return {"dim": self.dim, "groups": [list(g) for g in self.groups]}
        return {"dim": self.dim, "keep": list(self.keep or [])}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cut:
        if "groups" in data:
            return cls(int(data["dim"]), groups=[[int(i) for i in g] for g in data["groups"]])
        return cls(int(data["dim"]), keep=[int(i) for i in data["keep"]])

    def size(self) -> int:
        return len(self.groups[0]) if self.groups is not None else len(self.keep or [])


class Changes(Protocol):
    """What of a `CompactionPlan` is carried out, see there."""

    @property
    def cuts(self) -> Mapping[str, list[Cut]]: ...
    @property
    def merges(self) -> Mapping[str, list[Merge]]: ...
    @property
    def biases(self) -> Mapping[str, dict[str, Any]]: ...
    @property
    def attributes(self) -> Mapping[str, dict[str, Any]]: ...
    @property
    def replaced(self) -> Mapping[str, str]: ...


def cut_shape(shape: Sequence[int], cuts: Sequence[Cut]) -> tuple[int, ...]:
    result = list(shape)
    for cut in cuts:
        result[cut.dim] = cut.size()
    return tuple(result)


def cut_tensors(tensors: Sequence[Tensor], cuts: Sequence[Sequence[Cut]]) -> list[Tensor]:
    """Each tensor with its cuts made: one gather for the first dimensions of all, one for their second
    ones."""
    results = list(tensors)
    indices: dict[
        tuple[int, ...], Tensor
    ] = {}  # equal lists of kept indices share one tensor, checked and moved once
    rounds = max((len([c for c in per if c.keep is not None]) for per in cuts), default=0)
    for number in range(rounds):
        members, keep, dims = [], [], []
        for i, per in enumerate(cuts):
            plain = [c for c in per if c.keep is not None]
            if number < len(plain):
                key = tuple(plain[number].keep or ())
                members.append(i)
                keep.append(indices.setdefault(key, torch.tensor(key, dtype=torch.int64, device="cpu")))
                dims.append(plain[number].dim)
        for i, result in zip(
            members, compact_filters([results[i] for i in members], keep, dims), strict=True
        ):
            results[i] = result
    for i, per in enumerate(cuts):
        for cut in per:
            if cut.groups is not None:
                results[i] = _cut_groups(results[i], cut)
    return results


def _cut_groups(weight: Tensor, cut: Cut) -> Tensor:
    assert cut.groups is not None
    slabs = list(weight.detach().chunk(len(cut.groups), 0))
    keep = [torch.tensor(list(g), dtype=torch.int64, device="cpu") for g in cut.groups]
    return torch.cat(compact_filters(slabs, keep, cut.dim), 0)


def weight_of(bias: str) -> str:
    """The name of the weight of the layer that a bias belongs to."""
    prefix, dot, _ = bias.rpartition(".")
    return f"{prefix}{dot}weight"
