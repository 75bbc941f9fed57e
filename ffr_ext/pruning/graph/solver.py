"""Which channels may leave: the largest set whose absence no kept output notices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..norms import filter_norms
from .analysis import Analysis, Constraint, Read
from .channels import ResolvedSets
from .constants import Carriers, Merged, Waiting, absorbing_reads
from .states import on_cpu


@dataclass(frozen=True)
class Options:
    round_to: int = 1
    min_channels: int = 1


class Solver:
    """Starts from "every channel that is not pinned leaves" and takes back what some kept output needs.

    A live channel that only dead filters read is gone together with them, so starting from the other end
    (dead filters first) would find less. Each round can only take back, so it ends.
    """

    @on_cpu
    def __init__(self, analysis: Analysis, options: Options) -> None:
        self.analysis = analysis
        self.options = options
        self.sets: ResolvedSets = analysis.sets.resolve()
        channel_of = self.sets.channel_of
        self.axes = {
            (name, dim): channel_of[labels]
            for name, dims in analysis.labels.items()
            for dim, labels in enumerate(dims)
            if labels is not None
        }
        self.family = self._families()
        self.reads = [(r, channel_of[r.inputs], channel_of[r.outputs]) for r in reversed(analysis.reads)]
        self.parts = [
            (c, [channel_of[p] for p in c.parts], [channel_of[p] for p in c.inputs])
            for c in analysis.constraints
        ]
        self.absorbing = absorbing_reads(analysis)
        self.carriers = Carriers(analysis, self.reads, self.absorbing)
        self.reasons: dict[int, str] = {}
        self._gave_back = False  # dead channels were kept for a size
        self._settled = torch.zeros(0, dtype=torch.bool)  # channels that have left for good
        self._strength: Tensor | None = None

    def _families(self) -> Tensor:
        """Channels that share a dimension of some parameter, directly or through others: one number for each
        family."""
        family = torch.arange(len(self.sets))
        while True:
            before = family.clone()
            for channels in self.axes.values():
                family[channels] = family[channels].min()
            family = family[family]
            if torch.equal(before, family):
                return family

    @on_cpu
    def translate(self, channels: Tensor, other: Solver) -> Tensor:
        """The channels of parameters that are `channels` of another solver, whose analysis may number them
        differently."""
        mine = torch.zeros(len(self.sets), dtype=torch.bool)
        for axis, numbers in self.axes.items():
            if axis in other.axes:
                mine[numbers[channels[other.axes[axis]]]] = True
        return mine

    @on_cpu
    def solve(self, forbidden: Tensor | None = None) -> Tensor:
        """bool per channel: it leaves. `forbidden` channels stay for reasons of the caller's.

        Channels are given back for a size one dimension after the other, and one that was given back early may be
        there for another that turned out to be needed later. So what has left is settled, and solved for again, until
        nothing more leaves.
        """
        self._settled = torch.zeros(len(self.sets), dtype=torch.bool)
        while True:
            removed, gave_back = self._solve_once(forbidden)
            if not gave_back or torch.equal(removed, self._settled):
                return removed
            self._settled = removed

    def _solve_once(self, forbidden: Tensor | None) -> tuple[Tensor, bool]:
        self.reasons = {}
        self._gave_back = False
        removed = ~self.sets.pinned
        if forbidden is not None:
            removed &= ~forbidden
        # Channels that stay, but that no output depends on: kept for a size, or as a constant. What they in
        # turn are made from need not stay. So a dead branch that must keep one channel loses all its other
        # weights.
        spare = torch.zeros_like(removed)
        if bool(self._settled.any()):
            self._keep_the_last(removed, spare)
        while True:
            self._take_back_needed(removed, spare)
            if not self._restore(removed, spare):
                return removed, self._gave_back

    # ---------------------------------------------------------------------------------------------------
    # What kept outputs need
    # ---------------------------------------------------------------------------------------------------

    def _take_back_needed(self, removed: Tensor, spare: Tensor) -> None:
        while waiting := self._take_back(removed, spare):
            for channel, entry in self.carriers.choose(waiting, removed & ~self._settled).items():
                removed[channel] = False
                spare[channel] = True
                self._explain(entry.read, entry.inputs, entry.inputs == channel)

    def _take_back(self, removed: Tensor, spare: Tensor) -> list[Waiting]:
        """What is needed, whichever channels carry constants; then the constants that nothing carries yet."""
        changed = True
        while changed:
            changed = False
            waiting: list[Waiting] = []
            for read, inputs, outputs in self.reads:
                unneeded = (removed | spare)[inputs]
                if not bool(unneeded.any()):
                    continue
                blocked = (
                    unneeded & read.live & read.uses[~(removed | spare)[outputs] & ~read.silenced].any(0)
                )
                if bool(blocked.any()):
                    changed = True
                    self._explain(read, inputs, blocked)
                    removed[inputs[blocked]] = False
                    spare[inputs[blocked]] = False
                blocked = self._lost(read, inputs, outputs, removed)
                stays = blocked & ~self.carriers.mergeable[id(read)]
                if bool(stays.any()):
                    changed = True
                    self._explain(read, inputs, stays)
                    removed[inputs[stays]] = False
                    spare[inputs[stays]] = True
                if bool((blocked & ~stays).any()):
                    blocked = self.carriers.waiting(read, inputs, blocked & ~stays, removed)
                    if bool(blocked.any()):
                        waiting.append(Waiting(read, inputs, blocked))
        return waiting

    def _lost(self, read: Read, inputs: Tensor, outputs: Tensor, removed: Tensor) -> Tensor:
        """bool per input: a constant that leaves, that the bias does not take up, and that kept outputs use."""
        gone = removed[inputs] & ~read.live & (read.value != 0) & ~self.absorbing[id(read)]
        return gone & read.uses[~removed[outputs] & ~read.silenced].any(0) if bool(gone.any()) else gone

    @on_cpu
    def merged(self, removed: Tensor) -> Iterator[Merged]:
        """The constants that other channels carry, if the channels of `removed` leave."""
        for read, inputs, outputs in self.reads:
            carried = self._lost(read, inputs, outputs, removed)
            if bool(carried.any()):
                yield self.carriers.assign(read, inputs, carried, removed)

    @on_cpu
    def carried(self, removed: Tensor) -> Tensor:
        """bool per channel: it leaves as a constant that another channel carries."""
        result = torch.zeros_like(removed)
        for read, inputs, outputs in self.reads:
            result[inputs[self._lost(read, inputs, outputs, removed)]] = True
        return result

    def _explain(self, read: Read, inputs: Tensor, blocked: Tensor) -> None:
        refusal = read.refusal or "the layer is used several times, with different constants"
        for i in blocked.nonzero().flatten().tolist():
            if bool(read.live[i]):
                text = f"live, and read by {read.where}"
            else:
                text = f"constant {float(read.value[i]):.6g} that {read.where} cannot absorb: {refusal}"
            self.reasons.setdefault(int(inputs[i]), text)

    # ---------------------------------------------------------------------------------------------------
    # Sizes that must fit
    # ---------------------------------------------------------------------------------------------------

    def _keep_the_last(self, removed: Tensor, spare: Tensor) -> None:
        """Dimensions that are down to what they have to keep keep it, before others ask for what that reads."""
        for (name, dim), channels in self.axes.items():
            size = channels.numel()
            filters = self.analysis.out_axes.get(name) == dim
            least = min(size, self.options.min_channels) if filters else 1
            if size - int(self._settled[channels].sum()) <= least:
                self._give_back(removed, spare, channels, least, "dead, kept for min_channels")

    def _restore(self, removed: Tensor, spare: Tensor) -> bool:
        """Give back dead channels, the strongest first, until every dimension has an allowed size."""
        before, needed_before = removed.clone(), (removed | spare).clone()
        for (name, dim), channels in self.axes.items():
            size = channels.numel()
            kept = size - int(removed[channels].sum())
            if kept == size:
                continue
            needed = max(kept, 1)
            if self.analysis.out_axes.get(name) == dim:
                needed = max(needed, min(size, self.options.min_channels))
                needed = min(size, math.ceil(needed / self.options.round_to) * self.options.round_to)
            if needed > kept:
                at_least = kept < min(size, max(1, self.options.min_channels))
                why = "min_channels" if at_least else f"round_to={self.options.round_to}"
                self._give_back(removed, spare, channels, needed - kept, f"dead, kept for {why}")
        for constraint, parts, inputs in self.parts:
            self._fit(removed, spare, constraint, parts, inputs)
        for constraint, parts, _ in self.parts:
            if constraint.kind == "whole":  # every channel of a kept group is in the statistics of the others
                for part in parts:
                    if not bool(removed[part].all()):
                        spare[part] = False
        return not (torch.equal(before, removed) and torch.equal(needed_before, removed | spare))

    def _fit(
        self,
        removed: Tensor,
        spare: Tensor,
        constraint: Constraint,
        parts: list[Tensor],
        inputs: list[Tensor],
    ) -> None:
        why = f"dead, kept because {constraint.where} needs parts of one size"
        if constraint.kind == "whole":
            for part in parts:
                if not bool(removed[part].all()):
                    self._give_back(
                        removed, spare, part, part.numel(), f"dead, kept with its group in {constraint.where}"
                    )
            return
        if constraint.kind == "equal":
            self._level(removed, spare, parts, why, constraint.multiple)
            return
        present = [
            i
            for i in range(len(parts))
            if not bool(removed[parts[i]].all()) or not bool(removed[inputs[i]].all())
        ] or [0]
        self._level(removed, spare, [parts[i] for i in present], why)
        self._level(removed, spare, [inputs[i] for i in present], why)

    def _level(
        self, removed: Tensor, spare: Tensor, parts: list[Tensor], why: str, multiple: int = 1
    ) -> None:
        kept = [part.numel() - int(removed[part].sum()) for part in parts]
        most = max(1, *kept) if len(kept) > 1 else max(1, kept[0])
        most = math.ceil(most / multiple) * multiple
        for part, count in zip(parts, kept, strict=True):
            self._give_back(removed, spare, part, most - count, why)

    def _give_back(self, removed: Tensor, spare: Tensor, channels: Tensor, count: int, why: str) -> None:
        """Indices of a dimension, whose channels are `channels`: one channel can be at several (gate and up projections
        in one weight)."""
        gone, times = channels[removed[channels] & ~self._settled[channels]].unique(return_counts=True)
        if count <= 0 or not gone.numel():
            return
        order = self.strength()[gone].sort(descending=True, stable=True).indices
        before = times[order].cumsum(0) - times[order]
        strongest = gone[order[before < count]]
        removed[strongest] = False
        spare[strongest] = True
        self._gave_back = True
        for channel in strongest.tolist():
            self.reasons.setdefault(channel, why)

    @on_cpu
    def strength(self) -> Tensor:
        """Sum of squares of all filters of a channel: which of the dead to keep, where some must be."""
        if self._strength is None:
            self._strength = torch.zeros(len(self.sets), dtype=torch.float64)
            by_dim: dict[int, list[str]] = defaultdict(list)
            for name, dim in self.analysis.out_axes.items():
                if (name, dim) in self.axes and self.analysis.graph.tensors[name].is_floating_point():
                    by_dim[dim].append(name)
            for dim, names in by_dim.items():
                norms = filter_norms([self.analysis.graph.tensors[n].detach() for n in names], 2, dim)
                for name, values in zip(names, norms, strict=True):
                    self._strength.index_add_(0, self.axes[name, dim], values.cpu().double() ** 2)
        return self._strength

    # ---------------------------------------------------------------------------------------------------

    @on_cpu
    def why_kept(self, channel: int) -> str:
        if bool(self.sets.pinned[channel]):
            return self.sets.pin_reason(channel)
        return self.reasons.get(channel, "live")
