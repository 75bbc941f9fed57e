"""From the paths of a pass to one loss: where they are cut and joined, which weights go where, who differentiates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import compiled
from ..autograd import FlowCall, weighted_sum
from ..functional import FlowTerms, Maker, flow_terms, penalty
from ..options import FlowOptions
from ..reference import safe_sqrt
from ..stages import Stage, Sums, make_plan
from .paths import Path, independent, joined
from .taps import collect

Weight = float | Sequence[float] | Tensor


def penalty_of(
    paths: Sequence[Path], options: FlowOptions, gradient: Weight, curvature: Weight
) -> tuple[Tensor, Callable[[], FlowTerms]]:
    """The sum of the penalties of paths that all have a term, and a function that gives the terms."""
    terms: list[Callable[[], FlowTerms]] = []
    losses: list[Tensor] = []
    for path, weights in zip(paths, _weights(paths, options, gradient, curvature), strict=True):
        try:
            loss, terms_of_path = penalty(
                path.features, options, *weights, maker=_just_in_time(path), **_masked(path)
            )
        except (TypeError, ValueError) as error:
            if not str(error).startswith("features"):
                raise
            raise type(error)(
                f"{error}\nFeatureFlow captured {path.outputs()}; layers= chooses others"
            ) from error
        terms.append(terms_of_path)
        losses.append(loss)
    return total_of(losses), terms[0] if len(terms) == 1 else partial(_one_after_another, terms)


def terms_of(paths: Iterable[Path], options: FlowOptions) -> FlowTerms:
    """The terms of paths of which no loss was built."""
    terms: list[Callable[[], FlowTerms]] = []
    for path in paths:
        if path.sums:
            terms.append(penalty(path.features, options, 1.0, 1.0, maker=partial(_summed, path))[1])
            continue
        keywords: dict[str, Any] = {**asdict(options), **_masked(path)}
        terms.append(partial(flow_terms, [feature.detach() for feature in path.features], **keywords))
    return _one_after_another(terms)


def continuous(paths: Iterable[Path], transition: str) -> list[Path]:
    """The paths, cut where they are independent and joined where that changes no term."""

    def apart(a: Path, b: Path) -> bool:
        return transition == "pool" or a.features[-1].shape == b.features[0].shape

    return joined([part for path in paths for part in independent(path)], apart)


def _weights(
    paths: Sequence[Path], options: FlowOptions, gradient: Weight, curvature: Weight
) -> list[tuple[Weight, Weight]]:
    """Of each path the weights of its terms: those given one per term go through the paths of each call."""
    weights = (gradient, curvature)
    if len(paths) < 2 or not any(per_term(weight) for weight in weights):
        return [weights] * len(paths)
    result: list[tuple[Weight, Weight]] = []
    streams: set[int] = set()
    used = [0, 0]
    for index, path in enumerate(paths):
        if not streams.isdisjoint(path.streams):  # another call
            streams, used = set(), [0, 0]
        streams |= path.streams
        following = paths[index + 1] if index + 1 < len(paths) else None
        ends = following is None or not streams.isdisjoint(following.streams)
        plan = make_plan([tuple(f.shape) for f in path.features], options.transition)
        parts = []
        for kind, count in enumerate((plan.gradient_terms, plan.curvature_terms)):
            parts.append(_slice(weights[kind], used[kind], None if ends else used[kind] + count))
            used[kind] += count
        result.append((parts[0], parts[1]))
    return result


def _just_in_time(path: Path) -> Maker | None:
    """Who makes the sums of a path, or its loss, if each feature gets its gradient by itself; None for one node for all
    features, as in ``ffr_loss``."""
    if path.sums:
        return partial(_summed, path)
    taps = path.taps
    if any([tap is None and f.requires_grad for f, tap in zip(path.features, taps, strict=True)]):  # noqa: C419
        return None
    slots = [None if tap is None else tap[0] for tap in taps]
    return partial(collect, slots, [tap[1] for tap in taps if tap is not None])


def _summed(path: Path, _features: list[Tensor], stages: Sequence[Stage], call: FlowCall) -> Tensor:
    stats = path.stats(stages)
    if call.weights is None:
        return stats
    call.stats = stats.detach()
    entries = safe_sqrt(stats) if call.spec.sums.leading else stats
    return weighted_sum(entries, call.weights, call.dtype)


def sums_while_traced(options: FlowOptions) -> Sums | None:
    """What is summed of the features of a traced call right where they are made; None where that would not give all
    terms: angles beside absolute values, or features that are mapped to the next stage."""
    if options.backend != "auto" or options.transition == "pool" or (options.angles and not options.squared):
        return None
    return Sums(options.squared, int(options.per_sample or options.angles), compiled.DECOMPOSED)


def _masked(path: Path) -> dict[str, Any]:
    return {} if path.mask is None else {"mask": path.mask}


def _one_after_another(terms: Sequence[Callable[[], FlowTerms]]) -> FlowTerms:
    made = [make() for make in terms]
    if len(made) == 1:
        return made[0]
    device = made[0].gradient.device if made else None
    return FlowTerms(
        torch.cat([torch.zeros(0, device=device), *(each.gradient.to(device) for each in made)]),
        torch.cat([torch.zeros(0, device=device), *(each.curvature.to(device) for each in made)]),
    )


def total_of(losses: Iterable[Tensor]) -> Tensor:
    """Their sum, on the device of the first; 0 if there is none."""
    total: Tensor | None = None
    for loss in losses:
        total = loss if total is None else total + loss.to(total.device)
    return torch.zeros(()) if total is None else total


def per_term(weight: Any) -> bool:
    """Whether a weight is one for each term."""
    return weight.dim() > 0 if isinstance(weight, Tensor) else hasattr(weight, "__len__")


def times(weight: Weight, scale: float) -> Weight:
    """A weight, or the weights, times a number."""
    if scale == 1:
        return weight
    if per_term(weight) and not isinstance(weight, Tensor):
        return [entry * scale for entry in weight]  # type: ignore[union-attr]
    return weight * scale  # type: ignore[operator]


def _slice(weight: Weight, start: int, stop: int | None) -> Weight:
    return weight[start:stop] if per_term(weight) else weight  # type: ignore[index]
