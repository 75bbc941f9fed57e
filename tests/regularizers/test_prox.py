"""`prox`: every map against the smallest value found by search, and its edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from ffr_ext.regularizers import prox
from ffr_ext.regularizers.prox import KINDS, envelope, penalty

SINGLE = [
    ("l0", {}),
    ("l1", {}),
    ("transformed_l1", {}),
    ("transformed_l1", {"a": 0.3}),
    ("transformed_l1", {"a": 7.0}),
    ("scad", {}),
    ("scad", {"a": 2.5}),
]
WHOLE = [("l1_l2", {}), ("l1_l2", {"alpha": 0.4}), ("l1_l2", {"alpha": 0.0}), ("group", {})]


def cost(kind: str, u: Tensor, x: Tensor, t: float, parameters: dict[str, float]) -> float:
    return float((u - x).square().sum() / 2 + penalty(kind, u, t, **parameters))


def scad(u: Tensor, t: float, a: float) -> Tensor:
    """The integral of SCAD's slope, which is t up to t and falls to 0 at a t."""
    steps = torch.linspace(0, 1, 501, dtype=torch.float64)[:, None] * u.abs()
    slope = torch.where(steps <= t, t, ((a * t - steps).clamp(min=0)) / (a - 1))
    return torch.trapezoid(slope, steps, dim=0)


EACH = {
    "l0": lambda u, t: t * (u != 0),
    "l1": lambda u, t: t * u.abs(),
    "transformed_l1": lambda u, t, a=1.0: t * (a + 1) * u.abs() / (a + u.abs()),
    "scad": lambda u, t, a=3.7: scad(u, t, a),
}


@pytest.mark.parametrize("t", [0.05, 0.3, 0.9, 2.0])
@pytest.mark.parametrize(("kind", "parameters"), SINGLE, ids=str)
def test_single_weights_go_where_a_search_finds_the_least(
    kind: str, parameters: dict[str, float], t: float
) -> None:
    grid = torch.linspace(-6, 6, 6001, dtype=torch.float64)
    each = EACH[kind](grid, t, **parameters)
    assert float(penalty(kind, grid, t, **parameters)) == pytest.approx(float(each.sum()), rel=1e-4)
    x = torch.linspace(-5.03, 5.11, 41, dtype=torch.float64)
    got = prox(kind, x, t, **parameters)
    costs = (got - x).square() / 2 + EACH[kind](got, t, **parameters)
    least = ((grid - x[:, None]).square() / 2 + each).min(1).values
    assert bool((costs <= least + 2e-5).all())


@pytest.mark.parametrize("t", [0.05, 0.4, 1.1])
@pytest.mark.parametrize(("kind", "parameters"), WHOLE, ids=str)
def test_vectors_go_where_a_search_finds_the_least(kind: str, parameters: dict[str, float], t: float) -> None:
    line = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line, line)
    size = {"group": torch.linalg.vector_norm(grid, dim=1)}.get(kind)
    if size is None:
        alpha = parameters.get("alpha", 1.0)
        size = grid.abs().sum(1) - alpha * torch.linalg.vector_norm(grid, dim=1)
    for x in ([0.03, -0.01, 0.02], [0.5, -0.3, 0.2], [1.4, 1.4, -0.7], [-2.0, 0.1, 0.0], [0.4, 0.4, 0.4]):
        vector = torch.tensor(x, dtype=torch.float64)
        least = float(((grid - vector).square().sum(1) / 2 + t * size).min())
        assert cost(kind, prox(kind, vector, t, **parameters), vector, t, parameters) <= least + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.floats(-10, 10), max_size=12), st.floats(0, 3))
def test_a_map_never_grows_flips_or_worsens(kind: str, values: list[float], t: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    got = prox(kind, x, t)
    assert bool((got * x >= 0).all())
    if kind != "l1_l2":  # whose largest entries may grow back
        assert bool((got.abs() <= x.abs() + 1e-12).all())
    for other in (x, torch.zeros_like(x)):
        assert cost(kind, got, x, t, {}) <= cost(kind, other, x, t, {}) + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_layouts_and_dtypes_stay(kind: str) -> None:
    for x in (torch.randn(()), torch.randn(0), torch.randn(3, 4, 2, 2).to(memory_format=torch.channels_last)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            got = prox(kind, x.to(dtype), 0.1)
            assert got.shape == x.shape
            assert got.dtype == dtype
    x = torch.randn(5, 4)
    kept = x.clone()
    wide = prox(kind, x.bfloat16().double(), 0.3)
    torch.testing.assert_close(prox(kind, x.bfloat16(), 0.3).double(), wide, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(prox(kind, x.t(), 0.3), prox(kind, x, 0.3).t())
    torch.testing.assert_close(prox(kind, x, 0.0), x)
    assert torch.equal(x, kept)
    assert not prox(kind, x.requires_grad_(), 0.3).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_off_is_zero_and_nan_is_shown(kind: str) -> None:
    assert torch.equal(prox(kind, torch.full((4,), 1e-3), 0.5), torch.zeros(4)) or kind == "l1_l2"
    assert bool(prox(kind, torch.tensor([math.nan, 1.0]), 0.1)[0].isnan())
    assert not bool(prox(kind, torch.zeros(3), 0.1).isnan().any())


@pytest.mark.parametrize(("kind", "parameters"), [*SINGLE, *[w for w in WHOLE if w[0] != "group"]], ids=str)
def test_the_gradient_of_the_envelope_is_what_the_map_takes_away(
    kind: str, parameters: dict[str, float]
) -> None:
    x = torch.randn(200, dtype=torch.float64).requires_grad_()
    weight, beta = 0.15, 2.0
    (gradient,) = torch.autograd.grad(envelope(kind, x, weight, beta, **parameters), x)
    torch.testing.assert_close(gradient, beta * (x.detach() - prox(kind, x, weight / beta, **parameters)))
    for step in (1e-6 * torch.randn(200, dtype=torch.float64) for _ in range(3)):
        if kind == "l1_l2":
            continue
        slope = envelope(kind, x + step, weight, beta, **parameters) - envelope(
            kind, x - step, weight, beta, **parameters
        )
        assert float(slope.detach()) / 2 == pytest.approx(float((gradient * step).sum()), rel=1e-4, abs=1e-11)


def test_the_envelope_of_l0_is_a_capped_ridge() -> None:
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)
    expected = torch.minimum(2.5 * x.square() / 2, torch.tensor(0.1)).sum()
    torch.testing.assert_close(envelope("l0", x, 0.1, 2.5), expected)


@pytest.mark.parametrize(
    ("arguments", "parameters", "error", "message"),
    [
        (("l2", torch.ones(2), 1.0), {}, ValueError, "kind: expected one of 'l0'"),
        (("l1", torch.ones(2), -1.0), {}, ValueError, "t: expected a number of at least 0, got -1.0"),
        (("l1", torch.ones(2), math.nan), {}, ValueError, "t: expected a finite float"),
        (("l1", torch.ones(2), "1"), {}, TypeError, "t: expected a float, got '1'"),
        (
            ("l1", torch.ones(2, dtype=torch.int64), 1.0),
            {},
            TypeError,
            "floating-point tensor, got dtype torch.int64",
        ),
        (("l1", [1.0], 1.0), {}, TypeError, "x: expected a floating-point tensor, got list"),
        (("l1", torch.ones(2), 1.0), {"a": 2.0}, ValueError, "a: 'l1' has no such parameter; it has none"),
        (("scad", torch.ones(2), 1.0), {"a": 2.0}, ValueError, "a: expected more than 2 for 'scad', got 2"),
        (("transformed_l1", torch.ones(2), 1.0), {"a": 0.0}, ValueError, "more than 0"),
        (("l1_l2", torch.ones(2), 1.0), {"alpha": 1.5}, ValueError, "alpha: expected a number in 0 .. 1"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[Any, ...], parameters: dict[str, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        prox(*arguments, **parameters)
