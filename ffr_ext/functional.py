"""START HERE: `ffr_loss` and `flow_terms`, the feature-flow penalty of a list of features.

From a call to a kernel: the features are checked (`checks`), split into stages (`stages`), summed by one fused call
(`autograd.FlowProduct` -> `ops` -> a kernel), which also weights the sums, or they are weighted here (`terms`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor, nn

from . import checks, compiled, reference
from ._torch import transforms_active
from .autograd import FlowCall, FlowProduct, FlowSpec, FlowStats
from .options import FlowOptions
from .stages import Plan, Stage, Sums, make_plan, stage_features
from .terms import FlowTerms, Rows, assemble, counted, entry_weights, split, weigh

Weight = float | Sequence[float] | Tensor

# (features, stages, call) -> what `call` asks of `stages`, which share a device: their sums (float64, laid out as in
# design.md section 5), or the loss, and then the sums in `call.stats`. `FeatureFlow` has its own.
Maker = Callable[[list[Tensor], Sequence[Stage], FlowCall], Tensor]


def flow_terms(
    features: Iterable[Tensor],
    *,
    norm: str = "l1",
    curvature_kind: str = "difference",
    reduction: str = "mean",
    transition: str = "break",
    backend: str = "auto",
    mask: Tensor | None = None,
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
    options = FlowOptions(norm, curvature_kind, reduction, transition, backend)
    listed = checks.feature_list(features)
    plain = _are_plain(listed)
    plan = _plan(listed, transition, plain)
    positions = None if mask is None else _positions(mask, plan)
    backend = compiled.resolve(backend, listed[0].device)
    return _terms(listed, plan, options, backend, positions, _eager if plain else _stats)


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
    mask: Tensor | None = None,
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
            or a 1-D tensor). NaN and infinite numbers are refused; a tensor is not looked at.
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
        mask: for padded batches, a bool tensor (or one of zeros and ones, such as Hugging Face's attention_mask) of the
            leading dimensions of every feature: (B, T) for features (B, T, C); sizes of 1 are expanded. Positions
            where it is False neither count nor get a gradient, whatever is there: the loss is that of the features
            without them. "mean" divides by the elements that count ("l2": each sample's norm by the root of its own,
            then by the samples), "batchmean" by the samples that have any. Costs one float64 number per position and
            term instead of a copy of the features; below some 32 elements a position that is the larger part.

    Returns:
        The loss, a 0-dim tensor: float32 (float64 if a feature is float64). Differences and sums are made in float32
        (float64 for float64 features). Sub-gradients at ties follow torch: sign(0) = 0, and the Euclidean norm's
        gradient at 0 is 0. Only features that require grad get one, in their own dtype and strides.

    Raises:
        TypeError: a feature is no tensor or no floating-point tensor, or a weight is no real number.
        ValueError: an unknown option; no term at all (fewer than two features, or no two neighbours of one shape);
            features of one stage on different devices; as many weights as there are terms were expected; a weight that
            is not finite; a stage boundary that `transition="pool"` cannot map; a mask that does not fit a feature.
        RuntimeError: an explicit backend that is not available; a second derivative; torch.vmap.
    """
    options = FlowOptions(norm, curvature_kind, reduction, transition, backend)
    loss, _terms = penalty(features, options, gradient, curvature, mask=mask)
    return loss


class FFRLoss(nn.Module):
    """:func:`ffr_loss` as a module, for configurations that instantiate losses: ``FFRLoss(**keywords)(features)``."""

    def __init__(self, *, gradient: Weight = 1.0, curvature: Weight = 1.0, **options: str) -> None:
        super().__init__()
        self.gradient, self.curvature = gradient, curvature
        self.options = FlowOptions(**options)

    def forward(self, features: Iterable[Tensor], mask: Tensor | None = None) -> Tensor:
        """``ffr_loss(features, mask=mask, ...)``."""
        loss, _terms = penalty(features, self.options, self.gradient, self.curvature, mask=mask)
        return loss

    def extra_repr(self) -> str:
        settings = {"gradient": self.gradient, "curvature": self.curvature, **asdict(self.options)}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def penalty(
    features: Iterable[Tensor],
    options: FlowOptions,
    gradient: Weight,
    curvature: Weight,
    *,
    mask: Tensor | None = None,
    maker: Maker | None = None,
) -> tuple[Tensor, Callable[[], FlowTerms]]:
    """The loss, and a function that gives its terms without another pass over the features (and without holding
    them)."""
    listed = checks.feature_list(features)
    plain = _are_plain(listed)
    plan = _plan(listed, options.transition, plain)
    on_gradient = checks.term_weights("gradient", gradient, plan.gradient_terms)
    on_curvature = checks.term_weights("curvature", curvature, plan.curvature_terms)
    if plain or not torch.compiler.is_compiling():
        _warn_if_without_effect(on_gradient, on_curvature, plan)
    positions = None if mask is None else _positions(mask, plan)
    device, dtype = listed[0].device, _loss_dtype(listed)
    backend = compiled.resolve(options.backend, device)
    if (
        plain
        and positions is None
        and backend != "reference"
        and not options.angles
        and isinstance(on_gradient, float)
        and isinstance(on_curvature, float)
        and all([f.device == device for f in listed])  # noqa: C419  a third of the time of a generator
    ):
        weights = entry_weights(plan, options, on_gradient, on_curvature, device)
        sums = Sums(options.squared, int(options.per_sample), backend)
        spec = plan.kept.get(sums)
        if spec is None:
            spec = plan.kept[sums] = FlowSpec.of(plan.stages, sums)
        call = FlowCall(spec, weights=weights, dtype=dtype)
        loss = (maker or _eager)(listed, plan.stages, call)
        stats = call.stats
        assert stats is not None

        def terms_of_stats() -> FlowTerms:
            rows = split(stats, plan.stages, sums)
            return assemble(rows, rows, plan, options, None, device, dtype)

        return loss, terms_of_stats
    if (
        backend == compiled.DECOMPOSED
        and maker is None
        and positions is None
        and not (options.angles or options.per_sample)
        and isinstance(on_gradient, float)
        and isinstance(on_curvature, float)
        and all(f.device == device for f in listed)
    ):
        sums = Sums(options.squared, 0, backend)
        loss, parts = _decomposed(listed, plan, sums, options, on_gradient, on_curvature)

        def terms_of_parts() -> FlowTerms:
            stats = compiled.stats_of(parts, [s.length for s in plan.stages]).detach()
            rows = split(stats, plan.stages, sums)
            return assemble(rows, rows, plan, options, None, device, dtype)

        return loss.to(dtype), terms_of_parts
    maker = maker or (_eager if plain else _stats)
    terms = _terms(listed, plan, options, backend, positions, maker)
    loss = weigh("gradient", on_gradient, terms.gradient) + weigh("curvature", on_curvature, terms.curvature)
    return loss.to(dtype), lambda: terms


def _decomposed(
    features: list[Tensor],
    plan: Plan,
    sums: Sums,
    options: FlowOptions,
    on_gradient: float,
    on_curvature: float,
) -> tuple[Tensor, list[compiled.Part]]:
    """The usual loss in plain operations, for a compiler, and the sums it is made of."""
    walked = _walked(_differentiable(features), plan.stages)
    parts = compiled.decomposed_parts(walked, plan.stages, sums)
    divisors = [stage.divisor(options.norm, options.reduction) for stage in plan.stages]
    loss = compiled.weighted_sum(parts, plan, [(on_gradient / d, on_curvature / d) for d in divisors])
    return loss, parts


def _plan(features: list[Tensor], transition: str, plain: bool) -> Plan:
    return (_kept_plan if plain else make_plan)(tuple([f.shape for f in features]), transition)


_kept_plan = lru_cache(maxsize=256)(make_plan)


def _positions(mask: Tensor, plan: Plan) -> Tensor:
    return checks.position_mask(mask, [(s.first, s.shape) for s in plan.stages])


def _are_plain(features: list[Tensor]) -> bool:
    """Whether sizes are numbers and not symbols, and what is made now has values that may be kept."""
    return (
        len(features) > 0
        and type(features[0]) in (Tensor, nn.Parameter)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms_active())
    )


def _loss_dtype(features: list[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in [f.dtype for f in features] else torch.float32


def _warn_if_without_effect(
    gradient: float | list[float] | Tensor, curvature: float | list[float] | Tensor, plan: Plan
) -> None:
    """A penalty that is silently zero would train nothing: say so when all the weight lies on terms that do
    not exist.
    """
    if plan.curvature_terms or not isinstance(gradient, float) or not isinstance(curvature, float):
        return
    if gradient == 0.0 != curvature:
        warnings.warn(
            "ffr_loss is 0: gradient=0 and no stage has the three features a curvature term needs",
            stacklevel=4,
        )


def _walked(features: list[Tensor], stages: Sequence[Stage]) -> list[Tensor]:
    return [f for stage in stages for f in stage_features(features, stage)]


def _saves_signs(sums: Sums, walked: list[Tensor]) -> bool:
    """Whether a gradient of absolute values will be wanted."""
    return not sums.squared and torch.is_grad_enabled() and True in [f.requires_grad for f in walked]


def _differentiable(features: list[Tensor]) -> list[Tensor]:
    """Features in a graph that is traced: Dynamo takes an argument of torch.func.grad for one that needs no gradient; a
    view of it is none. Not of the others: each view takes its time to compile."""
    return [f if f.requires_grad else f.view_as(f) for f in features]


def _eager(features: list[Tensor], stages: Sequence[Stage], call: FlowCall) -> Tensor:
    """Where nothing traces or transforms."""
    walked = _walked(features, stages)
    call.save_signs = _saves_signs(call.spec.sums, walked)
    result: Tensor = FlowProduct.apply(call, *walked)
    return result


def _stats(features: list[Tensor], stages: Sequence[Stage], call: FlowCall) -> Tensor:
    """Where something does: the sums alone."""
    assert call.weights is None
    sums = call.spec.sums
    tracing = torch.compiler.is_compiling()
    if tracing:
        features = _differentiable(features)
    walked = _walked(features, stages)
    if sums.backend == compiled.DECOMPOSED:
        parts = compiled.decomposed_parts(walked, stages, sums, call.padding)
        return compiled.stats_of(parts, [stage.length for stage in stages])
    # Dynamo cannot trace a node that nobody differentiates.
    wanted = torch.is_grad_enabled() and any(f.requires_grad for f in walked)
    run = FlowStats.forward if tracing and not wanted else FlowStats.apply
    stats, _signs = run(call.spec, _saves_signs(sums, walked), call.padding, *walked)
    return stats


def _terms(
    features: list[Tensor],
    plan: Plan,
    options: FlowOptions,
    backend: str,
    mask: Tensor | None,
    maker: Maker,
) -> FlowTerms:
    """Every term by itself, for every setting."""
    if backend == "reference":
        for stage in plan.stages:
            begin = stage.first - stage.tail
            checks.check_one_device(begin, features[begin : stage.first + stage.own])
        return FlowTerms(
            *reference.flow_terms(
                features,
                norm=options.norm,
                curvature_kind=options.curvature_kind,
                reduction=options.reduction,
                transition=options.transition,
                mask=mask,
            )
        )
    per_sample = options.per_sample or (options.squared and options.angles)
    # With a mask one sum for each position, of which those that count are added up.
    leading = int(per_sample) if mask is None else mask.dim()
    rows = squares = _rows(features, plan.stages, Sums(options.squared, leading, backend), mask, maker)
    if options.angles and not options.squared:
        # Angles come from squared norms per sample; l1 has none of them, and takes a second pass.
        squares = _rows(features, plan.stages, Sums(True, max(leading, 1), backend), mask, maker)
    return assemble(rows, squares, plan, options, mask, features[0].device, _loss_dtype(features))


def _rows(
    features: list[Tensor], stages: Sequence[Stage], sums: Sums, mask: Tensor | None, maker: Maker
) -> Rows:
    """One fused call per run of stages on a device. With a mask the groups are samples, of what counts in them."""
    rows: Rows = []
    first = 0
    for index in range(1, len(stages) + 1):
        device = features[stages[first].first].device
        if index < len(stages) and features[stages[index].first].device == device:
            continue
        run = stages[first:index]
        if mask is None:
            call = FlowCall(FlowSpec.of(run, sums))
            rows += split(maker(features, run, call), run, sums)
        else:
            mask = mask.to(device)
            # Absolute values need no padding: the sign of a NaN is 0.
            call = FlowCall(FlowSpec.of(run, sums), padding=~mask if sums.squared else None)
            for stage, (lengths, bends) in zip(
                run, split(maker(features, run, call), run, sums), strict=True
            ):
                rows.append((counted(lengths, stage, mask), counted(bends, stage, mask)))
        first = index
    return rows
