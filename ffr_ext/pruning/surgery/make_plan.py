"""From the channels that leave to the plan: indices, absorbed constants, and the attributes that name
sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..filters import CONVOLUTIONS, TRANSPOSED, BatchNorm
from ..graph.solver import Solver
from ..graph.states import on_cpu
from .cuts import Cut, cut_shape
from .merges import merges_of
from .plan import CompactionPlan


@on_cpu
def make_plan(
    solver: Solver, removed: Tensor, source: Mapping[str, tuple[int, ...]], replaced: Mapping[str, str]
) -> CompactionPlan:
    """The plan that takes the channels of `removed` out of a model of the shapes `source`."""
    cuts = _cuts(solver, removed)
    return CompactionPlan(
        source=source,
        cuts=cuts,
        merges=merges_of(solver.merged(removed)),
        biases=_biases(solver, removed),
        attributes=_attributes(solver, removed, cuts, source),
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


def _attributes(
    solver: Solver, removed: Tensor, cuts: Mapping[str, list[Cut]], source: Mapping[str, tuple[int, ...]]
) -> dict[str, dict[str, Any]]:
    graph = solver.analysis.graph
    groups: dict[str, int] = {}
    for constraint, parts, inputs in solver.parts:
        if constraint.module is not None:
            together = [torch.cat([p, i]) for p, i in zip(parts, inputs, strict=True)] if inputs else parts
            groups[constraint.module] = sum(not bool(removed[channels].all()) for channels in together)

    def weight_shape(path: str) -> tuple[int, ...] | None:
        name = graph.name_of.get(f"{path}.weight" if path else "weight")
        return None if name is None else cut_shape(source[name], cuts.get(name, []))

    result: dict[str, dict[str, Any]] = {}
    for path, module in graph.modules.items():
        values = _sizes(module, weight_shape(path), groups.get(path))
        changed = {a: v for a, v in values.items() if getattr(module, a, v) != v}
        if changed:
            result[path] = changed
    for path, attribute, labels in solver.analysis.sized:
        owner = graph.modules.get(path)
        size = int((~removed[solver.sets.channel_of[labels]]).sum())
        if owner is not None and getattr(owner, attribute, size) != size:
            result.setdefault(path, {})[attribute] = size
    return result


def _sizes(module: nn.Module, weight: tuple[int, ...] | None, groups: int | None) -> dict[str, Any]:
    """The sizes that a module keeps as attributes, from the new shape of its weight."""
    if weight is None:
        return {}
    if isinstance(module, TRANSPOSED):
        depthwise = module.groups == module.in_channels and module.groups > 1
        new_groups = weight[0] if depthwise else module.groups
        return {"in_channels": weight[0], "out_channels": weight[1] * new_groups, "groups": new_groups}
    if isinstance(module, CONVOLUTIONS):
        if groups is not None:
            new_groups = groups
        elif module.groups == module.in_channels and module.groups > 1:
            new_groups = weight[0] // (module.out_channels // module.in_channels)
        else:
            new_groups = module.groups
        return {"out_channels": weight[0], "in_channels": weight[1] * new_groups, "groups": new_groups}
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0], **({} if groups is None else {"num_groups": groups})}
    if isinstance(module, (*BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
        return {"num_features": weight[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' linear layer of GPT-2
        return {"nf": weight[1], **({"nx": weight[0]} if hasattr(module, "nx") else {})}
    return {}
