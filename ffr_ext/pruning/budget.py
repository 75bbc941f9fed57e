"""`prune_to`: the weakest channels of a whole network leave until it is as small as asked.

Global greedy ranking with a cap for each layer, as out-in-channel pruning (Li et al., CVPR 2019) describes in words.
FLOPs and parameters of what would be left are sums of products of channel counts, so no model is built in the search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import at_least_one, check_choice
from ..models import as_call, copy_without_hooks, deep_copy
from .compaction import Compaction, compact
from .graph.analysis import Analysis
from .graph.groups import SCOPES, ChannelGroups, groups_of
from .graph.groups.costs import Costs
from .graph.solver import Options, Solver
from .graph.states import on_cpu
from .graph.trace import trace
from .measure import count_flops, count_parameters
from .ranks import check_same_on_all_ranks
from .scale import channel_scales, find_layers
from .surgery import optimizer as optimizer_state
from .surgery.plan import CompactionPlan, check_plain_module

ENERGIES = ("paper", "effective", "scale")
NORMALIZATIONS = ("none", "mean")

# Channels that turn out not to leave cost a second search without their family; each takes at least one family out.
_MAX_SEARCHES = 20


def prune_to(
    model: nn.Module,
    example_inputs: Any,
    *,
    flops: float | None = None,
    parameters: float | None = None,
    energy: str | Tensor = "paper",
    normalize: str = "none",
    cap: float = 0.5,
    scope: str = "inner",
    min_channels: int = 1,
    round_to: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    inplace: bool = False,
    measure: bool = True,
) -> Compaction:
    """Take the weakest channels out of a model until it has the share of FLOPs or parameters asked for.

    Channels of all layers are sorted by their energy and zeroed from the weakest on, passing over layers that have
    lost their ``cap``, until the target is met; then `compact` cuts them out, exactly: the result computes what the
    model with those channels zeroed does. ::

        smaller = prune_to(model, x, flops=0.5, optimizer=optimizer).model

    Args:
        model: Any module that `compact` takes. It is not changed, unless ``inplace``.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs.
        flops: Share of the FLOPs to keep, in (0, 1]. parameters: likewise of the parameters. With both, both are met.
        energy: What channels are ranked by. ``"paper"``: the sum of squares of all their slices
            (``channel_groups(...).energies(include_norm=False)``), as out-in-channel pruning. ``"effective"`` (ours):
            the squared effective scale times the squared norm of what reads the channel, which no rescaling of filters
            and norms changes. ``"scale"``: the squared effective scale alone, by which `sparsity` and
            `zero_small_filters` judge and which feature flow regularization drives down. Or a score of your own: one
            number for each of ``channel_groups(model, example_inputs, scope)``.
        normalize: ``"mean"`` divides the energies by their mean over the layer (ours: raw energies empty the layer
            whose weights are small by nature first). ``"none"``: as they are.
        cap: The largest share of its channels that a layer loses in one call, in (0, 1].
        scope: Which channels may leave, see `channel_groups`.
        min_channels: What a layer keeps at least. round_to: channel counts that change become multiples of it.
        optimizer: The optimizer that trains ``model``; it goes on with the result, see `compact`.
        inplace, measure: As of `compact`.

    Returns:
        `Compaction`. Its report compares with the model whose chosen channels are zeroed.

    Raises:
        TypeError: An argument is of another type.
        ValueError: An argument is out of range, no channel may leave, an energy is not finite, or the target is out of
            reach (the message says what is within), or one of FLOPs where values decide what experts cost. Nothing
            is changed then.
    """
    check_plain_module(model, "prune_to")
    targets = _targets(flops, parameters)
    _check_energy(energy)
    check_choice("normalize", normalize, NORMALIZATIONS)
    check_choice("scope", scope, SCOPES)
    share = _share("cap", cap)
    round_to, min_channels = at_least_one("round_to", round_to), at_least_one("min_channels", min_channels)
    optimizer_state.check_optimizer(optimizer)
    args, kwargs = as_call(example_inputs)
    with check_same_on_all_ranks() as agree:
        graph = trace(copy_without_hooks(model), args, kwargs)
        if "flops" in targets and graph.experts:
            raise ValueError(
                f"flops: {', '.join(sorted(graph.experts)[:3])} take as many tokens as values send them, so their "
                "FLOPs cannot be counted beforehand; expected parameters="
            )
        solver = Solver(Analysis(graph, strict=True), Options(1, min_channels))
        groups = groups_of(model, solver, scope)
        if len(groups) == 0:
            raise ValueError(f"model: prune_to finds no channel that may leave: {_reasons(groups)}")
        scores = _normalized(_scores(groups, solver, energy, example_inputs), groups, normalize)
        whole = {"flops": count_flops(model, args, kwargs), "parameters": count_parameters(model)}
        costs = Costs(solver, whole)
        search = _Search(groups, solver, scores, costs, share, min_channels, round_to)
        search.choose(targets)  # raises where nothing can reach it
        agree(" ".join(map(str, scores.tolist())))
    result = _cut(model, example_inputs, search, targets, measure, round_to, min_channels)
    return _hand_over(result, model, optimizer, inplace)


def _cut(
    model: nn.Module,
    example_inputs: Any,
    search: _Search,
    targets: Mapping[str, float],
    measure: bool,
    round_to: int,
    min_channels: int,
) -> Compaction:
    """Zero a copy and compact it, again where channels stay or more FLOPs are left than was counted."""
    wanted = dict(targets)
    for _ in range(_MAX_SEARCHES):
        chosen = search.choose(wanted, said=targets)
        zeroed = deep_copy(model)
        search.groups.zero_(chosen, zeroed)
        result = compact(
            zeroed,
            example_inputs,
            round_to=round_to,
            min_channels=min_channels,
            inplace=True,
            measure=measure,
        )
        stuck = _still_there(search.groups, chosen, result.plan)
        if bool(stuck.any()):
            search.forbid_families(stuck)
            continue
        shares = {
            "flops": result.report.flops[1] / max(result.report.flops[0], 1),
            "parameters": result.report.parameters[1] / result.report.parameters[0],
        }
        missed = [name for name, target in targets.items() if shares[name] > target]
        if not missed:
            return result
        for name in missed:
            wanted[name] *= targets[name] / shares[name]
    raise ValueError(
        "prune_to: the model does not shrink as its channels do; use compact on zeroed channels instead"
    )


def _hand_over(
    result: Compaction, model: nn.Module, optimizer: torch.optim.Optimizer | None, inplace: bool
) -> Compaction:
    """What is kept is as it was in `model`, so that the plan cuts `model` to the very same weights."""
    if inplace:
        result.plan.apply(model, optimizer)
        return Compaction(model, result.plan, result.report)
    if optimizer is not None:
        try:
            optimizer_state.carry_over(optimizer, model, result.model, result.plan)
        except optimizer_state.OptimizerError as error:
            raise ValueError(str(error)) from error
    return result


def _still_there(groups: ChannelGroups, chosen: Tensor, plan: CompactionPlan) -> Tensor:
    """Which of the chosen groups the plan has left in."""
    stays = torch.zeros_like(chosen)
    for axis in groups.layers():
        if any(axis.name.startswith(f"{path}.") for path in plan.replaced):
            continue
        cuts = [
            cut.keep for cut in plan.cuts.get(axis.name, []) if cut.dim == axis.dim and cut.keep is not None
        ]
        kept = axis.groups[list(cuts[0])] if cuts else axis.groups
        stays[kept[kept >= 0]] = True
    return stays & chosen


class _Search:
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
        self.channels = _channels(groups, solver)
        self.dead = solver.solve()
        self.units = _units(groups, solver, scores, self.dead, self.channels)
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
        for name, target in targets.items():
            if least[name] > target:
                raise ValueError(
                    f"{name}: {target:g} of the model cannot be reached; with cap={self.cap:g}, "
                    f"scope={self.groups.scope!r}, min_channels={self.min_channels} and round_to={self.round_to} the "
                    f"least is {math.ceil(least[name] * 1e4) / 1e4:g}; raise cap, prune in several rounds, or take "
                    "scope='all'"
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
def _channels(groups: ChannelGroups, solver: Solver) -> Tensor:
    """The solver's number of the channel of each group."""
    channels = torch.zeros(len(groups), dtype=torch.int64)
    for axis in groups.axes:
        member = axis.groups >= 0
        channels[axis.groups[member]] = solver.axes[axis.name, axis.dim][member]
    return channels


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


# ------------------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------------------


def _scores(groups: ChannelGroups, solver: Solver, energy: str | Tensor, example_inputs: Any) -> Tensor:
    """(groups,) in float64 on the CPU, all finite."""
    if isinstance(energy, Tensor):
        if tuple(energy.shape) != (len(groups),):
            raise ValueError(
                f"energy: expected one number for each of the {len(groups)} channel groups, got shape "
                f"{tuple(energy.shape)}"
            )
        scores = energy.detach().double().cpu()
    elif energy == "paper":
        scores = groups.energies(include_norm=False).double().cpu()
    else:
        scores, _ = channel_scales(groups, find_layers(groups.model, example_inputs))
        if energy == "effective":
            scores = scores * _reading_energies(groups, solver)
    if not bool(scores.isfinite().all()):
        group = int((~scores.isfinite()).nonzero()[0])
        name, _, index = groups[group].slices[0]
        raise ValueError(
            f"energy: that of channel group {group} ({name}[{index}], ...) is {float(scores[group])}; the weights must "
            "be finite"
        )
    return scores


def _reading_energies(groups: ChannelGroups, solver: Solver) -> Tensor:
    """The sum of squares of all that reads each group, grouped convolutions included."""
    everything = groups.energies(include_norm=False).double().cpu()
    total = everything - groups.energies(include_norm=False, separated=True).double().cpu()
    of_channel = torch.zeros(len(solver.sets), dtype=torch.float64, device="cpu")
    for name, inputs in solver.analysis.grouped_inputs.items():
        weight = solver.analysis.graph.tensors[name].detach().double().cpu()
        if weight.shape[1] > 1:  # else depthwise: it passes the channel on
            energies = weight.unflatten(0, (len(inputs), -1)).transpose(1, 2).flatten(2).square().sum(2)
            of_channel.index_add_(0, solver.sets.channel_of[torch.cat(inputs)], energies.flatten())
    return total.clamp(min=0) + of_channel[_channels(groups, solver)]


def _normalized(scores: Tensor, groups: ChannelGroups, normalize: str) -> Tensor:
    if normalize == "none":
        return scores
    means = torch.zeros_like(scores).index_add_(0, groups.families, scores)
    counts = torch.zeros_like(scores).index_add_(0, groups.families, torch.ones_like(scores))
    mean = (means / counts.clamp(min=1))[groups.families]
    return torch.where(mean == 0, 0.0, scores / mean)


# ------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------


def _targets(flops: float | None, parameters: float | None) -> dict[str, float]:
    given = {"flops": flops, "parameters": parameters}
    targets = {name: _share(name, value) for name, value in given.items() if value is not None}
    if not targets:
        raise ValueError("flops, parameters: expected the share to keep of one of them, got neither")
    return targets


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not 0 < float(value) <= 1:
        raise ValueError(f"{name}: expected a share in (0, 1], got {value!r}")
    return float(value)


def _check_energy(energy: Any) -> None:
    if isinstance(energy, Tensor):
        if energy.dtype == torch.bool or energy.is_complex():
            raise TypeError(f"energy: expected a tensor of real numbers, got dtype {energy.dtype}")
        return
    check_choice("energy", energy, ENERGIES)


def _reasons(groups: ChannelGroups) -> str:
    reasons = [f"{count} filters stay: {reason}" for reason, count in groups.pinned.items()]
    reasons += [f"{what} is an op that is not known here" for what in groups.unknown]
    return "; ".join(reasons[:5]) or "it makes no channels"
