"""What a compaction changed, what it had to leave and why, and what it gained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .graph.solver import Solver
from .graph.states import on_cpu

# Below this gain a smaller model is not called faster: run-to-run noise is of that size.
NO_GAIN = 0.98


@dataclass(frozen=True)
class ChannelSet:
    """Dimensions of tensors that are cut together, and what became of their channels."""

    tensors: tuple[str, ...]  # "name[dim]"
    channels: int
    removed: int
    reasons: dict[str, int]  # why the others stay -> how many
    merged: int = 0  # of the removed: constants that another channel carries on

    def __str__(self) -> str:
        shown = ", ".join(self.tensors[:3]) + (
            f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
        )
        merged = f", {self.merged} of them merged into a constant one that stays" if self.merged else ""
        lines = [f"{shown}: {self.removed} of {self.channels} channels removed{merged}"]
        lines += [
            f"    {count} stay: {reason}"
            for reason, count in sorted(self.reasons.items(), key=lambda r: -r[1])
        ]
        return "\n".join(lines)


@dataclass
class CompactionReport:
    """The figures of one compaction. ``str()`` is a summary, `explain` says why each channel that stayed did.

    Attributes:
        parameters, flops, bytes: (before, after). FLOPs are those of one forward pass on the example, counted
            by ``torch.utils.flop_counter``; bytes are parameters and buffers.
        latency: (before, after) seconds of a forward pass on the example, medians of interleaved runs; None
            if it was not measured.
        max_error: Largest absolute difference between the outputs of the two models, on the example and on
            random inputs.
        max_output: Largest absolute output, to judge `max_error` by.
        sets: The sets of channels, see `explain`.
        replaced: Modules that were dead as a whole -> the standard module that stands there now.
        unknown_ops: Ops that are not known here ("op in module" -> how often); what they touch stays.
        notes: Sentences on what else is worth knowing.
    """

    parameters: tuple[int, int]
    flops: tuple[int, int]
    bytes: tuple[int, int]
    latency: tuple[float, float] | None
    max_error: float
    max_output: float
    sets: list[ChannelSet]
    replaced: dict[str, str]
    unknown_ops: dict[str, int]
    notes: list[str] = field(default_factory=list)

    @property
    def channels(self) -> tuple[int, int]:
        """(before, after) over all sets."""
        before = sum(s.channels for s in self.sets)
        return before, before - sum(s.removed for s in self.sets)

    @property
    def merged(self) -> int:
        """How many of the removed channels were constants that one which stays carries on, see `explain`."""
        return sum(s.merged for s in self.sets)

    def explain(self) -> str:
        """For every set of channels: its tensors, how many left, how many of those as constants that another
        channel carries on, and why the others stay."""
        parts = [str(s) for s in self.sets]
        parts += [f"{path}: dead as a whole, replaced by nn.{kind}" for path, kind in self.replaced.items()]
        parts += [
            f"{what}: an op that is not known here ({n}x); its channels stay"
            for what, n in self.unknown_ops.items()
        ]
        return "\n".join([*parts, *self.notes]) if parts or self.notes else "no channels found"

    def verdict(self) -> str:
        """One plain sentence on what was gained."""
        if self.parameters[0] == self.parameters[1]:
            return (
                "Nothing could be removed, the model is as large and as fast as before: explain() says why."
            )
        smaller = 1 - self.parameters[1] / self.parameters[0]
        text = f"{smaller:.1%} of the parameters are gone"
        if self.latency is None:
            return f"{text}; the latency was not measured."
        before, after = self.latency
        if after >= NO_GAIN * before:
            return (
                f"{text}, but there is no speed-up on this device and input: {1e3 * after:.3g} ms against "
                f"{1e3 * before:.3g} ms. Uneven channel counts can cost more than they save; try "
                "round_to=8 or 16."
            )
        return f"{text}, and a forward pass takes {1e3 * after:.3g} ms against {1e3 * before:.3g} ms."

    def __str__(self) -> str:
        rows: list[tuple[str, float, float, Callable[[float], str]]] = [
            ("parameters", *self.parameters, _integer),
            ("FLOPs", *self.flops, _integer),
            ("bytes", *self.bytes, _integer),
            ("channels", *self.channels, _integer),
        ]
        if self.latency is not None:
            rows.append(("latency, ms", 1e3 * self.latency[0], 1e3 * self.latency[1], lambda v: f"{v:.3f}"))
        lines = [f"{'':<12}{'before':>16}{'after':>16}{'left':>8}"]
        for name, before, after, show in rows:
            left = f"{after / before:.1%}" if before else "-"
            lines.append(f"{name:<12}{show(before):>16}{show(after):>16}{left:>8}")
        lines.append(
            f"largest difference of the outputs {self.max_error:.3g} (largest output {self.max_output:.3g})"
        )
        lines.append(self.verdict())
        return "\n".join([*lines, *self.notes])


def _integer(value: float) -> str:
    return f"{int(value):,}"


@on_cpu
def channel_sets(solver: Solver, removed: Tensor) -> list[ChannelSet]:
    """The sets that filters of some layer belong to, in the order of their first tensor."""
    tensors: dict[int, list[str]] = {}
    with_filters = set()
    for (name, dim), channels in solver.axes.items():
        family = int(solver.family[channels[0]])
        tensors.setdefault(family, []).append(f"{name}[{dim}]")
        if solver.analysis.out_axes.get(name) == dim:
            with_filters.add(family)
    for labels in solver.analysis.filters_of_computed:
        with_filters.update(solver.family[solver.sets.channel_of[labels]].tolist())
    result = []
    carried = solver.carried(removed)
    for family, axes in tensors.items():
        if family in with_filters:
            members = (solver.family == family).nonzero().flatten()
            reasons = Counter(solver.why_kept(int(c)) for c in members[~removed[members]].tolist())
            result.append(
                ChannelSet(
                    tuple(axes),
                    members.numel(),
                    int(removed[members].sum()),
                    dict(reasons),
                    int(carried[members].sum()),
                )
            )
    return result


def experts_that_stay(solver: Solver) -> list[str]:
    """One line for all mixtures of experts whose dead hidden units can leave, one for those that stay as they are."""
    graph = solver.analysis.graph
    unknown = {what.split(" in ")[-1] for what in solver.analysis.unknown}
    as_they_are = {p for p in unknown if "experts" in p.split(".") or f"{p}.experts" in graph.modules}
    because = "because which tokens an expert gets depends on values"
    found = []
    if cut := graph.experts - as_they_are - graph.parts:
        found.append(f"{_listed(cut)}: all experts stay, {because}; their dead hidden units leave")
    if parts := graph.parts - as_they_are:
        found.append(
            f"{_listed(parts)}: all experts stay, {because}; their weights are read part by part, so that the hidden "
            "units leave that are dead in all of them (each loses its own where "
            "set_experts_implementation('grouped_mm') of transformers can be set)"
        )
    if as_they_are:
        found.append(f"{_listed(as_they_are)}: the experts stay as they are, {because}")
    if graph.assumed:
        found.append(
            "the forward code asks how many rows values have chosen: it was traced where there is at least one"
        )
    return found


def _listed(paths: set[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(path or "the model" for path in sorted(paths)[:3]) + more
