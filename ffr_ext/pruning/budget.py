"""`prune_to`: the weakest channels of a whole network leave until it is as small as asked.

The search is `graph/groups/greedy.py`; here are the energies that it ranks by, and the cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import at_least_one, check_choice
from ..models import as_call, deep_copy
from .compaction import Compaction, compact
from .graph.analysis import Analysis
from .graph.groups import SCOPES, ChannelGroups, groups_of
from .graph.groups.costs import Costs
from .graph.groups.greedy import GreedySearch, channels_of
from .graph.solver import Options, Solver
from .graph.trace import trace_copy
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

        smaller = prune_to(model, x, flops=0.6, optimizer=optimizer).model

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
        graph = trace_copy(model, args, kwargs)
        if "flops" in targets and graph.experts:
            raise ValueError(
                f"flops: {', '.join(sorted(graph.experts)[:3])} take as many tokens as values send them, so their "
                "FLOPs cannot be counted beforehand; expected parameters="
            )
        solver = Solver(Analysis(graph, strict=True), Options(1, min_channels))
        groups = groups_of(model, solver, scope)
        if len(groups) == 0:
            coupled = len(groups_of(model, solver, "all")) if scope == "inner" else 0
            hint = f"; scope='all' finds {coupled}, which additions couple" if coupled else ""
            raise ValueError(f"model: prune_to finds no channel that may leave: {_reasons(groups)}{hint}")
        scores = _normalized(_scores(groups, solver, energy, example_inputs), groups, normalize)
        whole = {"flops": count_flops(model, args, kwargs), "parameters": count_parameters(model)}
        costs = Costs(solver, whole)
        search = GreedySearch(groups, solver, scores, costs, share, min_channels, round_to)
        search.choose(targets)  # raises where nothing can reach it
        agree(" ".join(map(str, scores.tolist())))
    result = _cut(model, example_inputs, search, targets, measure, round_to, min_channels)
    return _hand_over(result, model, optimizer, inplace)


def _cut(
    model: nn.Module,
    example_inputs: Any,
    search: GreedySearch,
    targets: Mapping[str, float],
    measure: bool,
    round_to: int,
    min_channels: int,
) -> Compaction:
    """Zero a copy and compact it, again where channels stay or more is left than was counted."""
    wanted = dict(targets)
    shares: dict[str, float] = {}
    last: Tensor | None = None
    for _ in range(_MAX_SEARCHES):
        chosen = search.choose(wanted, said=targets)
        if last is None or not torch.equal(chosen, last):
            last = chosen
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
    raise ValueError(_out_of_reach(targets, shares, round_to, min_channels))


def _out_of_reach(
    targets: Mapping[str, float], shares: Mapping[str, float], round_to: int, min_channels: int
) -> str:
    asked = ", ".join(f"{name}: {target:g}" for name, target in targets.items())
    left = ", ".join(f"{shares[name]:.4g} of the {name}" for name in targets if name in shares)
    return (
        f"{asked} of the model cannot be reached: the cut leaves {left or 'it as it is'}, since dead channels that "
        f"stay (for round_to={round_to}, min_channels={min_channels}, the layers around) and biases that take up "
        "constants count too; raise cap, or prune in several rounds"
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
    return total.clamp(min=0) + of_channel[channels_of(groups, solver)]


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
