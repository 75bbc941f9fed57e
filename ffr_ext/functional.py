"""START HERE: `ffr_loss` and `flow_terms`, the feature-flow penalty of a list of features.

From a call to a kernel: the features are checked (`checks`), split into stages (`stages`), summed by one fused call
(`autograd.flow_stats` -> `ops` -> a kernel), and the few numbers that come back are weighted here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, reference, weighted
from .autograd import FlowSpec, FlowStats, flow_stats
from .checks import runs_eagerly
from .stages import Plan, Stage, make_plan, stage_features
from .term_weights import entry_weights, weigh

Weight = float | Sequence[float] | Tensor

# (features, stages, squared, per_sample, backend) -> stats: how the sums of `stages` are made. `FeatureFlow` has
# its own.
StatsMaker = Callable[[list[Tensor], Sequence[Stage], bool, bool, str], Tensor]


class FlowTerms(NamedTuple):
    """The terms of the penalty, one entry each, in depth order and before any weight."""

    gradient: Tensor
    curvature: Tensor


def flow_terms(
    features: Iterable[Tensor],
    *,
    norm: str = "l1",
    curvature_kind: str = "difference",
    reduction: str = "mean",
    transition: str = "break",
    backend: str = "auto",
) -> FlowTerms:
    """The gradient (length) and curvature of a feature flow, term by term.

    With d_l = x_{l+1} - x_l and c_l = x_{l+2} - 2 x_{l+1} + x_l inside each stage, equivalent to::

        gradient  = torch.stack([phi(b - a) for a, b in pairs])
        curvature = torch.stack([phi(c - 2 * b + a) for a, b, c in triples])

    where phi is the norm with its reduction, but in one pass over the features and without any of the differences in
    memory. Arguments, shapes, dtypes and errors are those of :func:`ffr_loss`.

    Returns:
        `FlowTerms(gradient, curvature)`: 1-D tensors in depth order, float32 (float64 if a feature is float64), on the
        device of the first feature. `curvature` is empty if no stage has three features. Both can be differentiated
        with any upstream gradient.
    """
    checks.check_options(norm, curvature_kind, reduction, transition)
    listed = checks.feature_list(features)
    plan, _ = _prepare(listed, transition, _cacheable(listed))
    chosen = _backend(backend, listed)
    if chosen == "reference":
        return FlowTerms(
            *reference.flow_terms(
                listed, norm=norm, curvature_kind=curvature_kind, reduction=reduction, transition=transition
            )
        )
    return _fused_terms(listed, plan, norm, curvature_kind, reduction, chosen, _stats)


def ffr_loss(
    features: Iterable[Tensor],
    *,
    gradient: Weight = 1.0,
    curvature: Weight = 1.0,
    norm: str = "l1",
    curvature_kind: str = "difference",
    reduction: str = "mean",
    transition: str = "break",
    backend: str = "auto",
) -> Tensor:
    """Feature flow regularization: penalise length and curvature of the path that features take through a network.

    Equivalent to the plain torch expression (norm="l1", reduction="mean", features of one shape)::

        d = [b - a for a, b in zip(features, features[1:])]
        c = [b - a for a, b in zip(d, d[1:])]
        gradient * sum(x.abs().mean() for x in d) + curvature * sum(x.abs().mean() for x in c)

    in one fused pass forward and one backward. No difference tensor is made: for l1 the signs of the differences are
    kept in 4 bits an element, and the backward pass reads nothing else.

    Source: Wu, Lan, Zhang, Xiang, "Feature Flow Regularization", arXiv 2106.02914. The public abstracts give the terms
    in words only, so the norm is a parameter; `docs/design.md` says which reading is which.

    Args:
        features: any iterable of tensors (list, tuple, generator, dict values) in depth order, each (B, ...) of rank
            >= 1, float16, bfloat16, float32 or float64, in any layout. Consecutive features of one shape form a stage;
            differences are taken inside stages. Mixed dtypes within a stage are promoted.
        gradient: weight of the first differences: a float, or one weight per term in depth order (a sequence of floats
            or a 1-D tensor). NaN and infinite weights are refused. A tensor is looked at only where that neither waits
            nor ends up in a graph: on the CPU, without requires_grad, and while nobody traces.
        curvature: weight of the second differences, likewise.
        norm: "l1" (sum of absolute values), "l2_squared" (sum of squares) or "l2" (Euclidean norm of each sample's
            difference, summed over samples: with the gradient terms the exact length of the trajectory).
        curvature_kind: "difference" applies the norm to c_l; "angle" is the angle in radians between d_l and d_{l+1}
            per sample (total absolute curvature of the polygon), whatever the norm. Differences in float32 leave an
            angle near 0 or pi uncertain by up to 2e-3.
        reduction: "sum"; "batchmean" divides by B; "mean" divides by the number of elements N ("l2": by
            B sqrt(N / B)). Angles are averaged over samples by both. The mean of an empty feature is 0.
        transition: "break": no terms between stages. "pool": the last features of the earlier stage (up to two) are
            average-pooled and zero-padded to the next stage's shape, and the terms that cross are added, once each.
        backend: "auto", "cuda", "triton", "cpu" or "reference". An explicit choice works or raises with the reason.

    Returns:
        The loss, a 0-dim tensor: float32 (float64 if a feature is float64). Differences and sums are made in float32
        (float64 for float64 features). Sub-gradients at ties follow torch: sign(0) = 0, and the Euclidean norm's
        gradient at 0 is 0. Only features that require grad get one, in their own dtype and strides.

    Raises:
        TypeError: a feature is no tensor or no floating-point tensor, or a weight is no real number.
        ValueError: an unknown option; no term at all (fewer than two features, or no two neighbours of one shape);
            features of one stage on different devices; as many weights as there are terms were expected; a weight that
            is not finite; a stage boundary that `transition="pool"` cannot map.
        RuntimeError: an explicit backend that is not available; a second derivative; torch.vmap.
    """
    loss, _terms = penalty(
        features,
        gradient=gradient,
        curvature=curvature,
        norm=norm,
        curvature_kind=curvature_kind,
        reduction=reduction,
        transition=transition,
        backend=backend,
    )
    return loss


def penalty(
    features: Iterable[Tensor],
    *,
    gradient: Weight,
    curvature: Weight,
    norm: str,
    curvature_kind: str,
    reduction: str,
    transition: str,
    backend: str,
    make_stats: StatsMaker | None = None,
) -> tuple[Tensor, Callable[[], FlowTerms]]:
    """The loss, and a function that gives its terms without another pass over the features (and without
    holding them).
    """
    checks.check_options(norm, curvature_kind, reduction, transition)
    listed = checks.feature_list(features)
    cacheable = _cacheable(listed)
    plan, recipe = _prepare(listed, transition, cacheable)
    on_gradient = checks.term_weights("gradient", gradient, plan.gradient_terms)
    on_curvature = checks.term_weights("curvature", curvature, plan.curvature_terms)
    _warn_if_without_effect(on_gradient, on_curvature, plan)
    chosen = _backend(backend, listed)
    device, dtype = listed[0].device, _loss_dtype(listed)
    if (
        chosen != "reference"
        and curvature_kind == "difference"
        and not isinstance(on_gradient, Tensor)
        and not isinstance(on_curvature, Tensor)
        and cacheable
        and all(f.device == device for f in listed)
    ):
        # All terms share one pass and the weights are numbers: the loss is one dot product with a cached vector.
        scale = entry_weights(plan, on_gradient, on_curvature, norm, reduction, device)
        squared, per_sample = norm != "l1", norm == "l2"
        if make_stats is None and recipe is not None and not per_sample:
            loss, sums = weighted.weighted_flow(recipe, listed, scale, dtype, squared, chosen)
        else:
            stats = (make_stats or _stats)(listed, plan.stages, squared, per_sample, chosen)
            entries = reference.safe_sqrt(stats) if per_sample else stats
            loss, sums = weighted.weighted_sum(entries, scale, dtype), stats.detach()

        def terms_of_sums() -> FlowTerms:
            rows = _split(sums, plan.stages, per_sample)
            return _assemble(rows, rows, plan, norm, curvature_kind, reduction, device, dtype)

        return loss, terms_of_sums
    if chosen == "reference":
        terms = FlowTerms(
            *reference.flow_terms(
                listed, norm=norm, curvature_kind=curvature_kind, reduction=reduction, transition=transition
            )
        )
    else:
        terms = _fused_terms(listed, plan, norm, curvature_kind, reduction, chosen, make_stats or _stats)
    loss = weigh("gradient", on_gradient, terms.gradient) + weigh("curvature", on_curvature, terms.curvature)
    return loss.to(dtype), lambda: terms


def _prepare(features: list[Tensor], transition: str, cacheable: bool) -> tuple[Plan, weighted.Recipe | None]:
    if cacheable:
        return weighted.prepare(weighted.signature(features), transition)
    return make_plan([tuple(f.shape) for f in features], transition), None  # sizes may be symbolic


def _cacheable(features: list[Tensor]) -> bool:
    """Whether sizes are plain numbers and tensors made now may be kept."""
    return len(features) > 0 and type(features[0]) in (Tensor, torch.nn.Parameter) and runs_eagerly()


def _loss_dtype(features: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32


def _backend(backend: str, features: list[Tensor]) -> str:
    return backends.resolve(backend, features[0].device.type)


def _warn_if_without_effect(
    gradient: float | list[float] | Tensor, curvature: float | list[float] | Tensor, plan: Plan
) -> None:
    """A penalty that is silently zero would train nothing: say so when all the weight lies on terms that do
    not exist.
    """
    if plan.curvature_terms or torch.compiler.is_compiling():
        return
    if isinstance(gradient, float) and isinstance(curvature, float) and gradient == 0.0 != curvature:
        warnings.warn(
            "ffr_loss is 0: gradient=0 and no stage has the three features a curvature term needs",
            stacklevel=4,
        )


def _walk(
    features: list[Tensor], stages: Sequence[Stage], squared: bool, per_sample: bool, backend: str
) -> tuple[FlowSpec, list[Tensor]]:
    """The settings of an autograd node over `stages`, which must share a device, and the features it walks."""
    walked = [f for stage in stages for f in stage_features(features, stage)]
    wants_gradient = torch.is_grad_enabled() and any(f.requires_grad for f in walked)
    spec = FlowSpec(
        lengths=tuple(stage.length for stage in stages),
        squared=squared,
        per_sample=per_sample,
        backend=backend,
        save_signs=wants_gradient and not squared,
    )
    return spec, walked


def _stats(
    features: list[Tensor], stages: Sequence[Stage], squared: bool, per_sample: bool, backend: str
) -> Tensor:
    """The kernels' sums for `stages`: float64, laid out as in design.md section 5."""
    if torch.compiler.is_compiling():
        # Dynamo takes an argument of torch.func.grad for one that needs no gradient; a view of it is none.
        features = [f.view_as(f) for f in features]
    spec, walked = _walk(features, stages, squared, per_sample, backend)
    if torch.compiler.is_compiling() and not any(f.requires_grad and torch.is_grad_enabled() for f in walked):
        # Dynamo cannot trace a node that nobody differentiates.
        stats, _signs = FlowStats.forward(spec, *walked)
        return stats
    return flow_stats(spec, walked)


def _rows(
    features: list[Tensor],
    stages: Sequence[Stage],
    squared: bool,
    per_sample: bool,
    backend: str,
    make_stats: StatsMaker,
) -> list[tuple[Tensor, Tensor]]:
    """Per stage the (differences, groups) and the (bends, groups) sums; one fused call per run of stages on a
    device.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    first = 0
    for index in range(1, len(stages) + 1):
        device = features[stages[first].first].device
        if index < len(stages) and features[stages[index].first].device == device:
            continue
        stats = make_stats(features, stages[first:index], squared, per_sample, backend)
        rows += _split(stats, stages[first:index], per_sample)
        first = index
    return rows


def _split(stats: Tensor, stages: Sequence[Stage], per_sample: bool) -> list[tuple[Tensor, Tensor]]:
    """`stats` of `stages` as views: per stage the (differences, groups) and the (bends, groups) sums."""
    rows, offset = [], 0
    for stage in stages:
        groups = stage.batch if per_sample else 1
        lengths, bends = stage.differences * groups, stage.bends * groups
        rows.append(
            (
                stats[offset : offset + lengths].view(stage.differences, groups),
                stats[offset + lengths : offset + lengths + bends].view(stage.bends, groups),
            )
        )
        offset += lengths + bends
    return rows


def _fused_terms(
    features: list[Tensor],
    plan: Plan,
    norm: str,
    curvature_kind: str,
    reduction: str,
    backend: str,
    make_stats: StatsMaker,
) -> FlowTerms:
    angles = curvature_kind == "angle"
    squared = norm != "l1"
    rows = _rows(features, plan.stages, squared, norm == "l2" or (squared and angles), backend, make_stats)
    # Angles come from squared norms per sample; l1 has none of them, and takes a second pass.
    squares = rows if squared or not angles else _rows(features, plan.stages, True, True, backend, make_stats)
    return _assemble(
        rows, squares, plan, norm, curvature_kind, reduction, features[0].device, _loss_dtype(features)
    )


def _assemble(
    rows: list[tuple[Tensor, Tensor]],
    squares: list[tuple[Tensor, Tensor]],
    plan: Plan,
    norm: str,
    curvature_kind: str,
    reduction: str,
    device: torch.device,
    dtype: torch.dtype,
) -> FlowTerms:
    """The terms from the kernels' sums; `squares` are squared norms per sample, which only angles need."""
    gradient, curvature = [], []
    for stage, (lengths, bends), (square_lengths, square_bends) in zip(
        plan.stages, rows, squares, strict=True
    ):
        divisor = stage.divisor(norm, reduction)
        root = reference.safe_sqrt if norm == "l2" else _identity
        gradient.append(root(lengths[stage.counted_by_earlier :]).sum(1) / divisor)
        if curvature_kind == "angle":
            theta = reference.angle(square_lengths[:-1], square_lengths[1:], square_bends).sum(1)
            curvature.append(theta if reduction == "sum" else theta / max(stage.batch, 1))
        else:
            curvature.append(root(bends).sum(1) / divisor)
    return FlowTerms(
        torch.cat([t.to(device) for t in gradient]).to(dtype),
        torch.cat([t.to(device) for t in curvature]).to(dtype),
    )


def _identity(rows: Tensor) -> Tensor:
    return rows
