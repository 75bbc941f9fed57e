"""A feature that is not finite shows in the loss, with every setting: a run that diverges must not look healthy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ffr_ext import ffr_loss, flow_terms

SETTINGS = list(
    itertools.product(("l1", "l2_squared", "l2"), ("difference", "angle"), ("sum", "batchmean", "mean"))
)


def plain_terms(features: list[Tensor], norm: str, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """The formula as anybody would write it, summed, with the angle by the cosine."""
    d = [(b - a).flatten(1) for a, b in itertools.pairwise(features)]
    c = [b - a for a, b in itertools.pairwise(d)]
    phi = {
        "l1": lambda x: x.abs().sum(),
        "l2_squared": lambda x: x.square().sum(),
        "l2": lambda x: x.norm(dim=1).sum(),
    }[norm]
    angles = [
        torch.acos((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).sum() for a, b in itertools.pairwise(d)
    ]
    return [phi(x) for x in d], angles if kind == "angle" else [phi(x) for x in c]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("norm", "kind", "reduction"), SETTINGS, ids=str)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_terms_are_not_finite_where_plain_torch_s_are_not(
    norm: str, kind: str, reduction: str, place: int, value: float, backend: str
) -> None:
    features = [torch.randn(2, 3, dtype=torch.float64) for _ in range(4)]
    features[place][1, 2] = value
    got = flow_terms(features, norm=norm, curvature_kind=kind, reduction=reduction, backend=backend)
    for terms, plain in zip(got, plain_terms(features, norm, kind), strict=True):
        truth = torch.stack(plain)
        assert torch.equal(terms.isnan(), truth.isnan())
        assert torch.equal(terms.isinf(), truth.isinf())


@pytest.mark.parametrize(("norm", "kind", "reduction"), SETTINGS, ids=str)
def test_features_of_nothing_but_nan(norm: str, kind: str, reduction: str, backend: str) -> None:
    features = [torch.full((2, 3), math.nan, requires_grad=True) for _ in range(3)]
    options: dict[str, Any] = {"norm": norm, "curvature_kind": kind, "reduction": reduction}
    for weights in ({}, {"gradient": 0.0}, {"curvature": 0.0}, {"gradient": [1.0, 0.0]}):
        assert ffr_loss(features, backend=backend, **weights, **options).isnan()


@pytest.mark.parametrize("still", [0, 1])
def test_an_angle_beside_a_step_of_zero_is_0_unless_the_other_step_is_not_finite(
    still: int, backend: str
) -> None:
    for value, expected in ((1.0, 0.0), (math.nan, math.nan), (math.inf, math.nan)):
        step = torch.full((1, 3), value)
        features = [torch.zeros(1, 3), torch.zeros(1, 3), step] if still == 0 else [-step, 0 * step, 0 * step]
        if still and not math.isfinite(value):
            features = [step, torch.zeros(1, 3), torch.zeros(1, 3)]
        (angle,) = flow_terms(features, norm="l2", curvature_kind="angle", backend=backend).curvature.tolist()
        assert angle == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("norm", ["l2_squared", "l2"])
def test_gradients_are_not_finite_where_plain_torch_s_are_not(norm: str, backend: str) -> None:
    features = [torch.randn(3, 2, dtype=torch.float64) for _ in range(3)]
    features[1][1, 0] = math.nan
    features[2][2, 1] = math.inf
    features = [f.requires_grad_() for f in features]
    ours = torch.autograd.grad(ffr_loss(features, norm=norm, reduction="sum", backend=backend), features)
    lengths, bends = plain_terms(features, norm, "difference")
    plain = torch.autograd.grad(sum(lengths) + sum(bends), features)
    for grad, truth in zip(ours, plain, strict=True):
        assert torch.equal(grad.isfinite(), truth.isfinite())
