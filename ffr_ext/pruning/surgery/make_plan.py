"""From the channels that leave to the plan: indices, absorbed constants, and the attributes that name
sizes."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from ..graph.solver import Solver
from ..graph.states import on_cpu
from .attributes import Sizes
from .cuts import Cut
from .merges import merges_of
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
        merges=merges_of(solver.merged(removed)),
        biases=_biases(solver, removed),
        attributes=Sizes(solver, removed, cuts, source).attributes(alone),
        replaced=replaced,
    )


def _cuts(solver: Solver, removed: Tensor) -> dict[str, list[Cut]]:
    cuts: dict[str, list[Cut]] = {}
    channel_of = solver.sets.channel_of
    for (name, dim), channels in solver.axes.items():
        kept = (~removed[channels]).nonzero().flatten()
        if kept.numel() < channels.numel():
            cuts.setdefault(name, []).append(Cut(dim, kept.tolist()))
    for name, groups in solver.analysis.grouped_inputs.items():
        keep = [(~removed[channel_of[g]]).nonzero().flatten().tolist() for g in groups]
        keep = [k for k in keep if k]
        if any(len(k) < g.numel() for k, g in zip(keep, groups, strict=False)):
            cuts.setdefault(name, []).append(Cut(1, groups=keep))
    return cuts


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
