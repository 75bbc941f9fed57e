"""Merges: a constant channel that stays carries the constants of others, in the weights that read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..graph.constants import Merged
from .cuts import Cut, CutError, cut_shape


@dataclass(frozen=True)
class Merge:
    """W[onto[k]] += factor[k] W[source[k]] along `dim`, before anything is cut; in a grouped convolution for the
    `rows` (of dimension 0) of one group."""

    dim: int
    source: Sequence[int]
    onto: Sequence[int]
    factor: Sequence[float]
    rows: Sequence[int] | None = None

    def to_json(self) -> dict[str, Any]:
        lists = {"from": list(self.source), "onto": list(self.onto), "factor": list(self.factor)}
        return {"dim": self.dim, **lists, **({} if self.rows is None else {"rows": list(self.rows)})}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Merge:
        source, onto = ([int(i) for i in data[k]] for k in ("from", "onto"))
        rows = None if data.get("rows") is None else [int(i) for i in data["rows"]]
        return cls(int(data["dim"]), source, onto, [float(f) for f in data["factor"]], rows)


def merges_of(found: Iterable[Merged]) -> dict[str, list[Merge]]:
    """Weight -> its merges. A layer that is used twice finds the same constants, which are merged once."""
    result: dict[str, list[Merge]] = {}
    done: set[tuple[str, int]] = set()
    for read, inputs, onto, factor in found:
        weight = read.weight
        assert weight is not None
        if (weight.name, read.start) in done:
            continue
        done.add((weight.name, read.start))
        rows = None if weight.rows is None else list(weight.rows)
        merge = Merge(weight.dim, inputs.tolist(), onto.tolist(), factor.tolist(), rows)
        result.setdefault(weight.name, []).append(merge)
    return result


def merged(weight: Tensor, merges: Sequence[Merge]) -> Tensor:
    """The weight with its merges made, each summed in float64 and rounded once; a copy if there are any."""
    if not merges:
        return weight
    result = weight.detach().clone()
    for merge in merges:
        _merge_into(result, merge)
    return result


def _merge_into(weight: Tensor, merge: Merge) -> None:
    targets = list(dict.fromkeys(merge.onto))
    matrix = torch.zeros(len(targets), len(merge.source), dtype=torch.float64, device="cpu")
    matrix[[targets.index(j) for j in merge.onto], range(len(merge.source))] = torch.tensor(
        list(merge.factor), dtype=torch.float64, device="cpu"
    )
    part = weight.movedim(merge.dim, 0)
    rows = None if merge.rows is None else torch.tensor(list(merge.rows), device=weight.device)

    def taken(indices: Sequence[int]) -> Tensor:
        picked = part[torch.tensor(list(indices), device=weight.device)]
        return (picked if rows is None else picked[:, rows]).double()

    added = torch.tensordot(matrix.to(weight.device), taken(merge.source), 1)
    total = (taken(targets) + added).to(weight.dtype)
    where = torch.tensor(targets, device=weight.device)
    if rows is None:
        part[where] = total
    else:
        part[where[:, None], rows[None, :]] = total


def check_merges(name: str, shape: Sequence[int], merges: Sequence[Merge]) -> None:
    """CutError for a merge that does not fit a weight of this shape."""
    for merge in merges:
        size = shape[merge.dim] if 0 <= merge.dim < len(shape) else 0
        indices = [*merge.source, *merge.onto]
        rows = list(merge.rows or [])
        if (
            not len(merge.source) == len(merge.onto) == len(merge.factor) > 0
            or min(indices) < 0
            or max(indices) >= size
            or set(merge.source) & set(merge.onto)
            or (rows and (merge.dim == 0 or min(rows) < 0 or max(rows) >= shape[0]))
        ):
            raise CutError(
                f"damaged compaction plan: the merges of {name} do not fit its shape {tuple(shape)}"
            )


def compose_merges(
    source: Mapping[str, tuple[int, ...]],
    cuts: Mapping[str, Sequence[Cut]],
    first: Mapping[str, Sequence[Merge]],
    second: Mapping[str, Sequence[Merge]],
) -> dict[str, list[Merge]]:
    """The merges of two plans in the indices of the first one's source, `cuts` being those of the first."""
    result = {name: list(merges) for name, merges in first.items()}
    for name, merges in second.items():
        own = cuts.get(name, [])
        moved = [_in_source(m, {c.dim: c for c in own}, cut_shape(source[name], own)) for m in merges]
        result[name] = [*result.get(name, []), *moved]
    return result


def _in_source(merge: Merge, cuts: Mapping[int, Cut], between: Sequence[int]) -> Merge:
    outputs, cut = cuts.get(0), cuts.get(merge.dim)
    rows = merge.rows
    if rows is not None and outputs is not None:
        rows = [list(outputs.keep or [])[i] for i in rows]
    if cut is None:
        return Merge(merge.dim, merge.source, merge.onto, merge.factor, rows)
    if cut.groups is None:
        keep = list(cut.keep or [])
    else:
        group = 0 if merge.rows is None else merge.rows[0] // (between[0] // len(cut.groups))
        keep = list(cut.groups[group])
    return Merge(
        merge.dim, [keep[i] for i in merge.source], [keep[i] for i in merge.onto], merge.factor, rows
    )
