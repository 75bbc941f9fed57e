"""The reference against numbers worked out by hand: the formulas of docs/design.md section 1, nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ffr_ext import ffr_loss, flow_terms, reference


def row(*values: float) -> Tensor:
    """One sample."""
    return torch.tensor([values], dtype=torch.float64)


# d_0 = (3, 4), d_1 = (0, -4), d_2 = (-5, 12);  c_0 = (-3, -8), c_1 = (-5, 16)
TRAJECTORY = [row(0, 0), row(3, 4), row(3, 0), row(-2, 12)]

BY_HAND = {
    "l1": ([7, 4, 17], [11, 21]),
    "l2_squared": ([25, 16, 169], [73, 281]),
    "l2": ([5, 4, 13], [math.sqrt(73), math.sqrt(281)]),
}


@pytest.mark.parametrize("norm", BY_HAND)
def test_terms_of_a_hand_worked_trajectory(norm: str, backend: str) -> None:
    terms = flow_terms(TRAJECTORY, norm=norm, reduction="sum", backend=backend)
    lengths, bends = BY_HAND[norm]
    assert terms.gradient.tolist() == pytest.approx(lengths, rel=1e-14)
    assert terms.curvature.tolist() == pytest.approx(bends, rel=1e-14)


@pytest.mark.parametrize(("norm", "mean_of_ones"), [("l1", 1.0), ("l2_squared", 1.0), ("l2", 1.0)])
def test_mean_of_a_difference_of_ones_is_one(norm: str, mean_of_ones: float, backend: str) -> None:
    """N, and B sqrt(M) for l2, are the sizes for which "mean" is independent of the feature's size."""
    features = [torch.zeros(3, 5, 2), torch.ones(3, 5, 2)]
    assert ffr_loss(features, norm=norm, backend=backend).item() == pytest.approx(mean_of_ones, rel=1e-6)


@pytest.mark.parametrize(("norm", "total"), [("l1", 30), ("l2_squared", 30), ("l2", 3 * math.sqrt(10))])
def test_batchmean_divides_the_sum_by_the_batch(norm: str, total: float, backend: str) -> None:
    features = [torch.zeros(3, 5, 2), torch.ones(3, 5, 2)]
    assert ffr_loss(features, norm=norm, reduction="sum", backend=backend).item() == pytest.approx(
        total, rel=1e-6
    )
    assert ffr_loss(features, norm=norm, reduction="batchmean", backend=backend).item() == pytest.approx(
        total / 3, rel=1e-6
    )


def test_l2_gradient_terms_are_the_length_of_the_trajectory(backend: str) -> None:
    terms = flow_terms(TRAJECTORY, norm="l2", reduction="sum", backend=backend)
    assert terms.gradient.sum().item() == pytest.approx(5 + 4 + 13)


def test_a_full_turn_of_a_polygon_has_total_absolute_curvature_of_its_exterior_angles(backend: str) -> None:
    """A regular hexagon turns by 60 degrees at each of its vertices."""
    corners = [row(math.cos(k * math.pi / 3), math.sin(k * math.pi / 3)) for k in range(7)]
    terms = flow_terms(corners, curvature_kind="angle", reduction="sum", backend=backend)
    assert terms.curvature.tolist() == pytest.approx([math.pi / 3] * 5, rel=1e-12)


def test_angle_is_independent_of_scale_and_keeps_its_digits_when_small(backend: str) -> None:
    theta = 1e-6  # 1 - cos(theta) = 5e-13: acos of a float32 cosine would say 0
    turned = [row(0, 0), row(1, 0), row(1 + math.cos(theta), math.sin(theta))]
    for scale in (1.0, 1e6):
        terms = flow_terms([scale * x for x in turned], curvature_kind="angle", backend=backend)
        assert terms.curvature.item() == pytest.approx(theta, rel=1e-6)


@pytest.mark.parametrize("turn", [0.0, math.pi], ids=["onwards", "back"])
@pytest.mark.parametrize("numel", [1, 16, 4096])
def test_angle_of_float32_differences_near_its_ends(numel: int, turn: float, backend: str) -> None:
    """Rounded differences are not quite parallel: one angle may be off by 2e-3, a thousand by less on average."""
    torch.manual_seed(0)
    step = torch.randn(1000, numel)
    on = step * (0.5 + 1.5 * torch.rand(1000, 1)) * math.cos(turn)
    terms = flow_terms([torch.zeros_like(step), step, step + on], curvature_kind="angle", backend=backend)
    assert terms.curvature.item() == pytest.approx(turn, abs=4e-4)


@pytest.mark.parametrize(
    ("trajectory", "expected"),
    [
        pytest.param([row(0, 0), row(0, 0), row(1, 0)], 0.0, id="no first step"),
        pytest.param([row(0, 0), row(1, 0), row(1, 0)], 0.0, id="no second step"),
        pytest.param([row(0, 0), row(1, 0), row(2, 0)], 0.0, id="straight"),
        pytest.param([row(0, 0), row(1, 0), row(0, 0)], math.pi, id="there and back"),
    ],
)
def test_angle_where_it_has_no_derivative_is_defined_with_zero_gradient(
    trajectory: list[Tensor], expected: float, backend: str
) -> None:
    leaves = [x.clone().requires_grad_() for x in trajectory]
    loss = ffr_loss(leaves, gradient=0.0, curvature_kind="angle", reduction="sum", backend=backend)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    for leaf in leaves:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_pooling_is_average_pooling_then_zero_channels() -> None:
    x = torch.randn(2, 3, 6, 4)
    expected = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 5))
    assert torch.allclose(reference.pool_to(x, torch.Size((2, 8, 3, 2))), expected)


def test_pool_adds_the_terms_that_cross_a_boundary_once_each_in_depth_order(backend: str) -> None:
    a = [torch.randn(2, 3, 4, 4, dtype=torch.float64) for _ in range(3)]
    b = [torch.randn(2, 5, 2, 2, dtype=torch.float64) for _ in range(2)]
    p = [F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 2)) for x in a]
    gradient = [a[1] - a[0], a[2] - a[1], b[0] - p[2], b[1] - b[0]]
    curvature = [a[2] - 2 * a[1] + a[0], b[0] - 2 * p[2] + p[1], b[1] - 2 * b[0] + p[2]]
    terms = flow_terms([*a, *b], transition="pool", backend=backend)
    assert torch.allclose(terms.gradient, torch.stack([d.abs().mean() for d in gradient]))
    assert torch.allclose(terms.curvature, torch.stack([c.abs().mean() for c in curvature]))


def test_break_takes_no_term_across_a_boundary(backend: str) -> None:
    a = [torch.randn(2, 3) for _ in range(2)]
    b = [torch.randn(2, 4) for _ in range(3)]
    terms = flow_terms([*a, *b], backend=backend)
    assert len(terms.gradient) == 1 + 2
    assert len(terms.curvature) == 0 + 1


def test_one_weight_per_term_in_depth_order(backend: str) -> None:
    weights = [1.0, -2.0, 0.5], [3.0, 0.0]
    lengths, bends = BY_HAND["l1"]
    expected = sum(w * t for w, t in zip(weights[0] + weights[1], lengths + bends, strict=True))
    for convert in (list, tuple, lambda w: torch.tensor(w, dtype=torch.float64)):
        loss = ffr_loss(
            TRAJECTORY,
            gradient=convert(weights[0]),
            curvature=convert(weights[1]),
            reduction="sum",
            backend=backend,
        )
        assert loss.item() == pytest.approx(expected)
