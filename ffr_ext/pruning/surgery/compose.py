"""Two plans, one after the other, as one; and whether a second one can be worth looking for.

A first cut can make another one possible: what had to stay for a size may not have to any more, a grouped
convolution becomes a depthwise one, or a branch is dead as a whole once its live channels have left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph.analysis import Constraint, Flow
from ..graph.solver import Solver
from ..graph.states import on_cpu
from .cuts import Cut, cut_shape
from .merges import compose_merges
from .plan import CompactionPlan


class CannotCompose(ValueError):
    """There is no single plan that does what the two do."""


@on_cpu
def may_continue(solver: Solver, removed: Tensor) -> bool:
    """Whether a second search can find more: where the cut changed how channels are coupled (parts of one channel each
    are no parts any more, a grouped convolution of one channel per group is depthwise), or left nothing but zeros.
    False for most models, which are then traced only once."""
    if not bool(removed.any()):
        return False
    return any(_decoupled(c, removed) for c in solver.parts) or _zero_where_kept(solver, removed)


def _decoupled(constrained: tuple[Constraint, list[Tensor], list[Tensor]], removed: Tensor) -> bool:
    """Parts that had several channels are left with one, or one part is left of several."""
    _, parts, inputs = constrained
    for vectors in (parts, inputs):
        left = [v.numel() - int(removed[v].sum()) for v in vectors]
        if any(left_of == 1 < v.numel() for left_of, v in zip(left, vectors, strict=True)):
            return True
        if sum(map(bool, left)) == 1 < len(left):
            return True
    return False


def _zero_where_kept(solver: Solver, removed: Tensor) -> bool:
    """Some tensor is not 0, but what is kept of it is."""
    for node, flow in solver.analysis.made.items():
        if node.op != "call_function" or not isinstance(flow, Flow):
            continue
        for dim, labels in enumerate(flow.labels):
            if labels is None:
                continue
            gone = removed[solver.sets.channel_of[labels]]
            zero = flow.state.zero()
            rest = [d for d in range(flow.rank) if d != dim]
            zero = (zero.all(dim=rest) if rest else zero).expand(flow.shape[dim])
            if bool(gone.any()) and bool((zero | gone).all()) and not bool(zero.all()):
                return True
    return False


@on_cpu
def removed_by(solver: Solver, plan: CompactionPlan) -> Tensor:
    """bool per channel of the solver: it leaves by this plan."""
    removed = torch.zeros(len(solver.sets), dtype=torch.bool)
    present, left = removed.clone(), removed.clone()
    for (name, dim), channels in solver.axes.items():
        present[channels] = True
        if not _inside(name, plan.replaced):
            left[channels] = True
        for keep in _kept(solver, plan, name, dim):
            gone = torch.ones(channels.numel(), dtype=torch.bool)
            gone[list(keep)] = False
            removed[channels[gone]] = True
    return removed | (present & ~left)


def _kept(solver: Solver, plan: CompactionPlan, name: str, dim: int) -> list[Sequence[int]]:
    """The lists of kept indices that the plan has for a dimension of a tensor, or of an expert's part of one."""
    for stack, parts in solver.analysis.graph.stacks.items():
        if name in parts:
            expert = parts.index(name)
            return [
                cut.groups[expert] if cut.groups is not None else cut.keep or []
                for cut in plan.cuts.get(stack, [])
                if cut.dim == dim + 1
            ]
    return [cut.keep for cut in plan.cuts.get(name, []) if cut.dim == dim and cut.keep is not None]


@on_cpu
def compose(first: CompactionPlan, second: CompactionPlan) -> CompactionPlan:
    """The plan that does in one go what `second` does to the result of `first`.

    Kept indices compose, absorbed constants add up. CannotCompose where the second names a tensor that the
    source does not have (a tied one that got another first name).
    """
    replaced = {p: k for p, k in first.replaced.items() if not _inside(p, second.replaced)}
    replaced.update(second.replaced)
    created = {n for n, entry in first.biases.items() if entry["create"]}
    for name in second.cuts:
        if name not in first.source and name not in created:
            raise CannotCompose(f"{name} is not in the source")
    cuts: dict[str, list[Cut]] = {}
    for name, shape in first.source.items():
        if not _inside(name, replaced):
            both = _compose_cuts(shape, first.cuts.get(name, []), second.cuts.get(name, []))
            if both:
                cuts[name] = both
    biases = {
        name: entry
        for name in dict.fromkeys([*first.biases, *second.biases])
        if not _inside(name, replaced) and (entry := _compose_bias(name, first, second)) is not None
    }
    attributes = {
        path: {**first.attributes.get(path, {}), **second.attributes.get(path, {})}
        for path in dict.fromkeys([*first.attributes, *second.attributes])
        if path not in replaced and not _inside(path, replaced)
    }
    merges = {
        name: entries
        for name, entries in compose_merges(first.source, first.cuts, first.merges, second.merges).items()
        if not _inside(name, replaced)
    }
    return CompactionPlan(first.source, cuts, biases, attributes, replaced, merges)


def _inside(name: str, paths: Mapping[str, str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _compose_bias(name: str, first: CompactionPlan, second: CompactionPlan) -> dict[str, Any] | None:
    a, b = first.biases.get(name), second.biases.get(name)
    if a is None:
        return b
    add = list(a["add"])
    for cut in second.cuts.get(name, []):
        if cut.dim != 0 or cut.keep is None:
            raise CannotCompose(f"{name} is cut as no bias is")
        add = [add[i] for i in cut.keep]
    if b is not None:
        if b["create"] or len(b["add"]) != len(add):
            raise CannotCompose(f"{name} does not take up what the second plan adds")
        add = [x + y for x, y in zip(add, b["add"], strict=True)]
    return {"create": a["create"], "add": add}


def _compose_cuts(shape: Sequence[int], first: Sequence[Cut], second: Sequence[Cut]) -> list[Cut]:
    between = cut_shape(shape, first)
    before, after = {c.dim: c for c in first}, {c.dim: c for c in second}
    result = []
    for dim in dict.fromkeys([*before, *after]):
        a, b = before.get(dim), after.get(dim)
        if a is None:
            assert b is not None
            result.append(b)
        elif a.groups is not None:
            result.append(Cut(dim, groups=_compose_groups(a.groups, b, between, after.get(0))))
        elif b is None:
            result.append(a)
        elif b.groups is not None:
            raise CannotCompose("the inputs of a convolution got groups")
        else:
            kept = list(a.keep or [])
            result.append(Cut(dim, [kept[i] for i in b.keep or []]))
    return result


def _compose_groups(
    groups: Sequence[Sequence[int]], second: Cut | None, between: Sequence[int], outputs: Cut | None
) -> list[list[int]]:
    """The kept inputs of each group that is left; a group leaves with all its outputs."""
    per_group = between[0] // len(groups)
    kept = range(between[0]) if outputs is None else outputs.keep or []
    left = [list(groups[g]) for g in dict.fromkeys(i // per_group for i in kept)]
    if second is None:
        return left
    own = second.groups if second.groups is not None else [second.keep or []]
    if len(own) != len(left):
        raise CannotCompose("the plans count different groups")
    return [[inputs[i] for i in keep] for inputs, keep in zip(left, own, strict=True)]
