"""Which channels leave for a budget: the weakest of the whole network, within what each layer may lose.

Global greedy ranking with a cap for each layer, as out-in-channel pruning (Li et al., CVPR 2019) describes in words.
FLOPs and parameters of what would be left are sums of products of channel counts, so no model is built in the search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..solver import Solver
from ..states import on_cpu
from .channel_groups import ChannelGroups
from .costs import Costs


class GreedySearch:
    """Which channels leave for a target: a prefix of one fixed order."""

    def __init__(
        self,
        groups: ChannelGroups,
        solver: Solver,
        scores: Tensor,
        costs: Costs,
        cap: float,
        min_channels: int,
        round_to: int,
    ) -> None:
        self.groups, self.scores, self.costs = groups, scores, costs
        self.cap, self.min_channels, self.round_to = cap, min_channels, round_to
        self.channels = channels_of(groups, solver)
        self.dead = solver.solve()
        carry = _carriers(solver, self.dead)[self.channels]
        units = _units(groups, solver, scores, self.dead, self.channels)
        self.units = [unit for unit in units if not bool(carry[unit].any())]
        self.layers = [axis.groups[axis.groups >= 0] for axis in groups.layers()]
        self.sizes = [int((~self.dead[solver.axes[axis.name, axis.dim]]).sum()) for axis in groups.layers()]
        self.forbidden: set[int] = set()

    def forbid_families(self, stuck: Tensor) -> None:
        self.forbidden |= set(self.groups.families[stuck].unique().tolist())

    @on_cpu
    def choose(self, targets: Mapping[str, float], said: Mapping[str, float] | None = None) -> Tensor:
        """(groups,) bool: the shortest prefix of the order that meets the targets. ValueError where none does."""
        order = self._order()

        def meets(count: int) -> bool:
            shares = self.costs.shares(self._removed(order[:count]))
            return all(shares[name] <= target for name, target in targets.items())

        if not meets(len(order)):
            self._refuse(order, said or targets)
        low, high = -1, len(order)  # meets(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return self._chosen(order[:high])

    def _refuse(self, order: list[list[int]], targets: Mapping[str, float]) -> None:
        least = self.costs.shares(self._removed(order))
        ways = ["raise cap", "prune in several rounds"] if self.cap < 1 else []
        ways += ["take scope='all'"] if self.groups.scope != "all" else []
        advice = f"; {' or '.join(ways)}" if ways else ""
        for name, target in targets.items():
            if least[name] > target:
                raise ValueError(
                    f"{name}: {target:g} of the model cannot be reached; with cap={self.cap:g}, "
                    f"scope={self.groups.scope!r}, min_channels={self.min_channels} and round_to={self.round_to} the "
                    f"least is {math.ceil(least[name] * 1e4) / 1e4:g}{advice}"
                )

    def _order(self) -> list[list[int]]:
        """The units in the order in which they leave, without those that a layer's cap or minimum keeps."""
        of_group: list[list[int]] = [[] for _ in range(len(self.groups))]
        for number, members in enumerate(self.layers):
            for group in members.tolist():
                of_group[group].append(number)
        left = [min(math.floor(self.cap * s + 1e-9), s - self.min_channels) for s in self.sizes]
        families = self.groups.families.tolist()
        order = []
        for unit in self.units:
            lost: dict[int, int] = {}
            for group in unit:
                for layer in of_group[group]:
                    lost[layer] = lost.get(layer, 0) + 1
            if any(left[layer] < n for layer, n in lost.items()) or families[unit[0]] in self.forbidden:
                continue
            for layer, n in lost.items():
                left[layer] -= n
            order.append(unit)
        return order

    def _chosen(self, units: list[list[int]]) -> Tensor:
        """The groups of the units, less those given back to make channel counts multiples of `round_to`."""
        chosen = torch.zeros(len(self.groups), dtype=torch.bool)
        chosen[[group for unit in units for group in unit]] = True
        if self.round_to == 1:
            return chosen
        changed = True
        while changed:
            changed = False
            for members, size in zip(self.layers, self.sizes, strict=True):
                gone = members[chosen[members]]
                kept = size - gone.numel()
                if gone.numel() and kept % self.round_to:
                    strongest = int(gone[self.scores[gone].argmax()])
                    chosen[next(unit for unit in self.units if strongest in unit)] = False
                    changed = True
        return chosen

    def _removed(self, units: list[list[int]]) -> Tensor:
        """bool for each channel of the solver."""
        removed = self.dead.clone()
        removed[self.channels[self._chosen(units)]] = True
        return removed


@on_cpu
def channels_of(groups: ChannelGroups, solver: Solver) -> Tensor:
    """The solver's number of the channel of each group."""
    channels = torch.zeros(len(groups), dtype=torch.int64)
    for axis in groups.axes:
        member = axis.groups >= 0
        channels[axis.groups[member]] = solver.axes[axis.name, axis.dim][member]
    return channels


@on_cpu
def _carriers(solver: Solver, dead: Tensor) -> Tensor:
    """bool for each channel of the solver: it stays since it carries the constants of some that leave. Without it
    another of those would have to stay, and nothing would be won."""
    carry = torch.zeros(len(solver.sets), dtype=torch.bool)
    for merged in solver.merged(dead):
        carry[solver.sets.channel_of[merged.read.inputs][merged.onto]] = True
    return carry


@on_cpu
def _units(
    groups: ChannelGroups, solver: Solver, scores: Tensor, dead: Tensor, channels: Tensor
) -> list[list[int]]:
    """What leaves at a time, the weakest first: a channel, or several where an op needs parts of one size (as many
    from each group of a convolution) or parts that stay whole (the groups of a group norm)."""
    group_of = torch.full((len(solver.sets),), -1)
    group_of[channels] = torch.arange(len(groups))
    bound: dict[int, list[int] | None] = {}
    for constraint, parts, inputs in solver.parts:
        for side in (parts, inputs) if inputs else (parts,):
            found = _bound_units(constraint.kind, [group_of[p] for p in side], scores, dead, channels)
            members = {int(g) for p in side for g in group_of[p].tolist() if g >= 0}
            for group in members:
                unit = next((u for u in found if group in u), None)
                known = bound.get(group, unit)
                bound[group] = unit if known == unit else None  # two ops that disagree: it stays
    units = {tuple(u) for u in bound.values() if u is not None}
    alone = {(g,) for g in range(len(groups)) if g not in bound and not bool(dead[channels[g]])}
    listed = sorted(units | alone)
    means = [float(scores[list(unit)].mean()) for unit in listed]
    return [list(listed[i]) for i in sorted(range(len(listed)), key=lambda i: means[i])]


def _bound_units(
    kind: str, parts: Sequence[Tensor], scores: Tensor, dead: Tensor, channels: Tensor
) -> list[list[int]]:
    if any(bool((part < 0).any()) for part in parts):
        return []  # some channel of the parts has to stay
    alive = [part[~dead[channels[part]]] for part in parts]
    if kind == "whole":
        return [sorted(set(part.tolist())) for part in alive if part.numel()]
    ranked = [part[scores[part].argsort(stable=True)].tolist() for part in alive]
    if len({len(part) for part in ranked}) > 1:
        return []
    return [sorted(set(unit)) for unit in zip(*ranked, strict=True)]
