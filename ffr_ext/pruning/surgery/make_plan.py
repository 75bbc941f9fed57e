"""From the channels that leave to the plan: indices, absorbed constants, and the attributes that name
sizes."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..graph.solver import Solver
from ..graph.states import on_cpu
from .attributes import Sizes
from .cuts import Cut
from .merges import Merge, merges_of
from .plan import CompactionPlan


@on_cpu
def make_plan(
    solver: Solver,
    removed: Tensor,
    source: Mapping[str, tuple[int, ...]],
    replaced: Mapping[str, str],
    alone: Container[str] = (),
) -> CompactionPlan:
    """The plan that takes the channels of `removed` out of a model of the shapes `source`. The numbers
    that the user's own modules keep follow where they are the sizes of what is cut, but in the modules left `alone`."""
    cuts = _cuts(solver, removed)
    return CompactionPlan(
        source=source,
        cuts=cuts,
        merges=_of_stacks(solver, merges_of(solver.merged(removed))),
        biases=_biases(solver, removed),
        attributes=Sizes(solver, removed, cuts, source).attributes(alone),
        replaced=replaced,
    )


def _cuts(solver: Solver, removed: Tensor) -> dict[str, list[Cut]]:
    cuts: dict[str, list[Cut]] = {}
    channel_of = solver.sets.channel_of
    stacked = {part for parts in solver.analysis.graph.stacks.values() for part in parts}
    for (name, dim), channels in solver.axes.items():
        kept = (~removed[channels]).nonzero().flatten()
        if name in stacked:
            continue
        if kept.numel() < channels.numel():
            cuts.setdefault(name, []).append(Cut(dim, kept.tolist()))
    for name, groups in solver.analysis.grouped_inputs.items():
        keep = [(~removed[channel_of[g]]).nonzero().flatten().tolist() for g in groups]
        keep = [k for k in keep if k]
        if any(len(k) < g.numel() for k, g in zip(keep, groups, strict=False)):
            cuts.setdefault(name, []).append(Cut(1, groups=keep))
    for name in solver.analysis.graph.stacks:
        cut = _cuts_of_stack(solver, removed, name)
        if cut:
            cuts[name] = cut
    return cuts


def _cuts_of_stack(solver: Solver, removed: Tensor, name: str) -> list[Cut]:
    """Of a tensor of all experts: where they share channels one list of what is kept, else one for each expert."""
    parts = solver.analysis.graph.stacks[name]
    cuts = []
    for dim in range(solver.analysis.graph.tensors[parts[0]].dim()):
        channels = [solver.axes[part, dim] for part in parts if (part, dim) in solver.axes]
        if not any(bool(removed[c].any()) for c in channels):
            continue
        keep = [(~removed[c]).nonzero().flatten().tolist() for c in channels]
        shared = all(c.equal(channels[0]) for c in channels)
        cuts.append(Cut(dim + 1, keep[0]) if shared else Cut(dim + 1, groups=keep))
    return cuts


def _of_stacks(solver: Solver, merges: dict[str, list[Merge]]) -> dict[str, list[Merge]]:
    """What is merged in the weight of one expert, as a merge in its rows of the tensor of all."""
    place = {
        part: (name, expert)
        for name, parts in solver.analysis.graph.stacks.items()
        for expert, part in enumerate(parts)
    }
    result: dict[str, list[Merge]] = {}
    for name, entries in merges.items():
        if name in place:
            stack, expert = place[name]
            entries = [replace(m, dim=m.dim + 1, rows=[expert]) for m in entries]
            result.setdefault(stack, []).extend(entries)
        else:
            result[name] = entries
    return result


def _biases(solver: Solver, removed: Tensor) -> dict[str, dict[str, Any]]:
    amounts: dict[str, Tensor] = {}
    kept_of: dict[str, Tensor] = {}
    creates: dict[str, bool] = {}
    done: set[tuple[str, int]] = set()
    for read, inputs, outputs in reversed(solver.reads):
        taken = removed[inputs] & (read.value != 0) & ~read.live & solver.absorbing[id(read)]
        if read.bias is None or read.weight_sum is None or not bool(taken.any()):
            continue
        name, part = read.bias.name, slice(read.bias.offset, read.bias.offset + outputs.numel())
        if (name, read.bias.offset) in done:  # a layer used twice: the constants are the same, and added once
            continue
        done.add((name, read.bias.offset))
        amount = amounts.setdefault(name, torch.zeros(read.bias.size, dtype=torch.float64))
        kept = kept_of.setdefault(name, torch.ones(read.bias.size, dtype=torch.bool))
        amount[part] += read.weight_sum()[:, taken] @ read.value[taken]
        kept[part] = ~removed[outputs]
        creates[name] = not read.bias.exists
    # A layer of several groups: the outputs of groups that absorb nothing are filtered as well.
    for read, _, outputs in solver.reads:
        if read.bias is not None and read.bias.name in kept_of:
            part = slice(read.bias.offset, read.bias.offset + outputs.numel())
            kept_of[read.bias.name][part] = ~removed[outputs]
    return {
        name: {"create": creates[name], "add": amount[kept_of[name]].tolist()}
        for name, amount in amounts.items()
        if bool((amount[kept_of[name]] != 0).any())
    }
