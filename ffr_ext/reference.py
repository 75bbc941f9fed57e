"""The maths of feature flow regularization in plain torch: oracle of the tests, baseline of the benchmarks, fallback.

Nothing here is fused and every difference is materialised; that is the point: it can be read next to the formulas of
`docs/design.md` section 1. It imports nothing of this package and works on any device and under any transform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def split_stages(features: Sequence[Tensor]) -> list[list[Tensor]]:
    """Maximal runs of consecutive features of one shape, in depth order."""
    stages: list[list[Tensor]] = []
    for feature in features:
        if stages and stages[-1][-1].shape == feature.shape:
            stages[-1].append(feature)
        else:
            stages.append([feature])
    return stages


def pool_to(feature: Tensor, shape: torch.Size) -> Tensor:
    """`feature` (B, C, ...) in the shape of the next stage: average pooling, then zero-padding of channels.

    The parameter-free shortcut of ResNet (option A), with the average instead of the strided sample. Equivalent to
    `F.pad(F.avg_pool2d(x, ratio), (0, 0, 0, 0, 0, C_new - C))` for images; any number of spatial dimensions works.
    """
    for axis in range(2, feature.dim()):
        pooled, ratio = shape[axis], feature.shape[axis] // max(int(shape[axis]), 1)
        if ratio > 1:
            feature = feature.unflatten(axis, (pooled, ratio)).mean(axis + 1)
    missing = shape[1] - feature.shape[1] if feature.dim() > 1 else 0
    if missing:
        padding = feature.new_zeros((feature.shape[0], missing, *feature.shape[2:]))
        feature = torch.cat([feature, padding], dim=1)
    return feature


def phi(difference: Tensor, norm: str, reduction: str, mask: Tensor | None = None) -> Tensor:
    """phi(d) of design.md section 1: a 0-dim penalty of one difference (B, ...), which is 0 where a mask is False."""
    batch = max(difference.shape[0], 1)
    per_sample = max(difference.numel(), 1) / batch
    mean = batch * (per_sample**0.5 if norm == "l2" else per_sample)
    divisor: float | Tensor = {"sum": 1, "batchmean": batch, "mean": mean}[reduction]
    if mask is not None:
        divisor = masked_divisor(difference.shape, norm, reduction, mask)
    if norm == "l1":
        return difference.abs().sum() / divisor
    if norm == "l2_squared":
        return difference.square().sum() / divisor
    return (safe_sqrt(squared_norms(difference)) / divisor).sum()


def at_positions(mask: Tensor, rank: int) -> Tensor:
    """A mask of the leading dimensions in `rank` dimensions."""
    return mask[(...,) + (None,) * (rank - mask.dim())]


def counted(shape: Sequence[int], mask: Tensor) -> Tensor:
    """How many elements of each sample of a feature count: (B,)."""
    positions = mask.expand(tuple(shape[: mask.dim()])).unsqueeze(-1).flatten(1).sum(1)
    return positions * math.prod(shape[mask.dim() :])


def masked_divisor(shape: Sequence[int], norm: str, reduction: str, mask: Tensor) -> Tensor | int:
    """What phi(d) is divided by where only some positions count. With norm="l2" each sample's norm has its own."""
    if reduction == "sum":
        return 1
    elements = counted(shape, mask)
    samples = (elements > 0).sum().clamp(min=1)
    if reduction == "batchmean":
        return samples
    return samples * elements.clamp(min=1).double().sqrt() if norm == "l2" else elements.sum().clamp(min=1)


def squared_norms(difference: Tensor) -> Tensor:
    """Squared Euclidean norm of each sample: (B, ...) -> (B,)."""
    return difference.square().flatten(1).sum(1) if difference.dim() > 1 else difference.square()


def safe_sqrt(squared: Tensor) -> Tensor:
    """`squared.sqrt()` with gradient 0, not infinity, at 0."""
    zero = squared == 0.0  # a NaN is not
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


def angle(before: Tensor, after: Tensor, bend: Tensor) -> Tensor:
    """Angle in radians between two vectors, from ``|before|^2``, ``|after|^2`` and ``|after - before|^2``.

    ``1 - cos = (bend - (|before| - |after|)^2) / (2 |before| |after|)`` keeps its digits at small angles, where the
    cosine itself is 1 to working precision. 0 with zero gradient where a vector is zero or both are (anti)parallel;
    NaN where one is not finite.
    """
    a, b = safe_sqrt(before), safe_sqrt(after)
    still = (before == 0) | (after == 0)
    scale = torch.where(still, 1, 2 * a * b)
    # 0 times a bend that is not finite is NaN.
    one_minus_cos = torch.where(still, 0 * bend.detach(), (bend - (a - b).square()) / scale).clamp(0, 2)
    back = one_minus_cos >= 2
    edge = (one_minus_cos <= 0) | back  # a NaN is not
    u = torch.where(edge, 1, one_minus_cos)
    theta = 2 * torch.atan2(u.sqrt(), (2 - u).sqrt())
    return torch.where(edge, torch.where(back, torch.pi, 0.0), theta)


def angle_term(before: Tensor, after: Tensor, reduction: str, mask: Tensor | None = None) -> Tensor:
    """Total absolute curvature at one vertex of the trajectory: `angle` per sample, summed or averaged over them."""
    rows = [squared_norms(d.double()) for d in (before, after, after - before)]
    theta = angle(*rows).sum()
    if mask is not None:
        reduction = "sum" if reduction == "sum" else "batchmean"
        return theta / masked_divisor(before.shape, "l2", reduction, mask)
    return theta if reduction == "sum" else theta / max(before.shape[0], 1)


def flow_terms(
    features: Sequence[Tensor],
    *,
    norm: str = "l1",
    curvature_kind: str = "difference",
    reduction: str = "mean",
    transition: str = "break",
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All gradient terms and all curvature terms in depth order, as two 1-D tensors. `mask`: bool, of the leading
    dimensions of every feature; what it leaves out is 0 before any difference is taken, so that no NaN gets out."""
    features = list(features)
    accumulate = torch.float64 if any(f.dtype == torch.float64 for f in features) else torch.float32
    gradient, curvature = [], []
    previous: list[Tensor] = []
    for stage in split_stages(features):
        tail = previous[-2:] if transition == "pool" else []
        x = [pool_to(f, stage[0].shape) for f in tail] + stage
        x = [f.to(accumulate) for f in x]
        if mask is not None and len(x) > 1:  # a feature without a term may have any shape
            mask = mask.to(x[0].device)
            x = [torch.where(at_positions(mask, f.dim()), f, 0) for f in x]
        d = [after - before for before, after in pairwise(x)]
        for before, after in pairwise(d):
            if curvature_kind == "angle":
                curvature.append(angle_term(before, after, reduction, mask))
            else:
                curvature.append(phi(after - before, norm, reduction, mask))
        # With two mapped features the first difference lies inside the earlier stage, which has counted it.
        gradient += [phi(difference, norm, reduction, mask) for difference in d[1 if len(tail) == 2 else 0 :]]
        previous = stage
    empty = features[0].new_zeros(0, dtype=accumulate)
    stack = lambda terms: torch.stack([t.to(accumulate) for t in terms]) if terms else empty  # noqa: E731
    return stack(gradient), stack(curvature)


def ffr_loss(
    features: Sequence[Tensor],
    *,
    gradient: float | Tensor = 1.0,
    curvature: float | Tensor = 1.0,
    norm: str = "l1",
    curvature_kind: str = "difference",
    reduction: str = "mean",
    transition: str = "break",
    mask: Tensor | None = None,
) -> Tensor:
    """`(gradient * gradient_terms).sum() + (curvature * curvature_terms).sum()`, a 0-dim tensor."""
    lengths, bends = flow_terms(
        features,
        norm=norm,
        curvature_kind=curvature_kind,
        reduction=reduction,
        transition=transition,
        mask=mask,
    )
    return (gradient * lengths).sum() + (curvature * bends).sum()
