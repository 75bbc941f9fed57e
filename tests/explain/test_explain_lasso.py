"""The mu-lasso against known answers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from ffr_ext.explain.lasso import largest_eigenvalue, mu_lasso


def problem(rows: int = 40, columns: int = 12, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (rows,), generator=generator)
    return x, torch.nn.functional.one_hot(labels, classes).double()


def simplex_projection(v: Tensor, mu: float, positive: bool) -> Tensor:
    """By bisection on the level, independent of sorting."""
    size = v.clamp(min=0) if positive else v.abs()
    low, high = 0.0, float(size.max())
    if float(size.sum()) <= mu:
        high = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((size - middle).clamp(min=0).sum()) > mu else (low, middle)
    shrunk = (size - high).clamp(min=0)
    return shrunk if positive else shrunk * v.sign()


@pytest.mark.parametrize("positive", [True, False])
def test_an_orthonormal_design_gives_the_projection_of_the_correlations(positive: bool) -> None:
    q = torch.linalg.qr(torch.randn(30, 8, dtype=torch.float64))[0]
    target = torch.randn(30, 2, dtype=torch.float64) * 3
    w = mu_lasso(q.T @ q, q.T @ target, 1.5, positive=positive).weights
    for j in range(2):
        torch.testing.assert_close(
            w[:, j], simplex_projection(q.T @ target[:, j], 1.5, positive), atol=1e-12, rtol=0
        )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    mu=st.sampled_from([0.05, 0.5, 2.0, 20.0, 500.0]),
    positive=st.booleans(),
    columns=st.integers(1, 15),
)
def test_the_solution_is_feasible_and_meets_the_conditions_of_optimality(
    seed: int, mu: float, positive: bool, columns: int
) -> None:
    x, targets = problem(columns=columns, seed=seed)
    solution = mu_lasso(
        x.T @ x, x.T @ targets, mu, positive=positive, tolerance=1e-12, max_iterations=200_000
    )
    w = solution.weights
    assert float(w.abs().sum(0).max()) <= mu * (1 + 1e-12)
    assert not positive or float(w.min()) >= 0
    for j in range(3):
        pull = x.T @ (targets[:, j] - x @ w[:, j])  # minus the gradient
        level = pull.clamp(min=0).max() if positive else pull.abs().max()
        chosen = w[:, j].abs() > 1e-6 * mu
        if float(w[:, j].abs().sum()) < mu * (1 - 1e-6):
            level = torch.zeros(())
        # Every chosen feature pulls with the multiplier, in the direction of its weight; none pulls harder.
        torch.testing.assert_close(
            pull[chosen] * w[chosen, j].sign(), level.expand(int(chosen.sum())).double(), atol=1e-4, rtol=1e-4
        )
        assert float(pull.max() if positive else pull.abs().max()) <= float(level) + 1e-4


@pytest.mark.parametrize("positive", [True, False])
def test_it_agrees_with_the_lasso_of_scikit_learn_at_the_same_multiplier(positive: bool) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, targets = problem(seed=3)
    w = mu_lasso(x.T @ x, x.T @ targets, 0.8, positive=positive, tolerance=1e-15).weights
    for j in range(3):
        pull = x.T @ (targets[:, j] - x @ w[:, j])
        multiplier = float(pull.max() if positive else pull.abs().max())
        lasso = linear_model.Lasso(
            alpha=multiplier / len(x), fit_intercept=False, positive=positive, tol=1e-15, max_iter=50_000
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no tolerance is small enough for it to be content and exact
            other = torch.from_numpy(lasso.fit(x.numpy(), targets[:, j].numpy()).coef_)
        torch.testing.assert_close(w[:, j], other, atol=1e-7, rtol=0)


def test_a_large_bound_gives_nonnegative_least_squares() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    x, targets = problem(seed=5)
    w = mu_lasso(x.T @ x, x.T @ targets, 1e6, tolerance=1e-14, max_iterations=200_000).weights
    for j in range(3):
        torch.testing.assert_close(
            w[:, j], torch.from_numpy(optimize.nnls(x.numpy(), targets[:, j].numpy())[0]), atol=1e-6, rtol=0
        )


def test_a_feature_of_zeros_is_never_selected() -> None:
    x, targets = problem(seed=7)
    x[:, 4] = 0
    for mu in (0.1, 3.0, 1e4):
        w = mu_lasso(x.T @ x, x.T @ targets, mu, max_iterations=200_000).weights
        assert w[4].tolist() == [0, 0, 0]


def test_too_few_iterations_warn_with_the_gap_that_is_left() -> None:
    x, targets = problem()
    with pytest.warns(
        RuntimeWarning, match=r"stopped after 3 iterations at a duality gap of [\d.e-]+"
    ) as caught:
        solution = mu_lasso(x.T @ x, x.T @ targets, 5.0, max_iterations=3)
    best = mu_lasso(x.T @ x, x.T @ targets, 5.0, tolerance=1e-14, max_iterations=200_000).weights

    def loss(w: Tensor) -> Tensor:
        return 0.5 * (x @ w - targets).square().sum(0)

    assert bool((solution.gap >= loss(solution.weights) - loss(best) - 1e-12).all())
    assert len(caught) == 1


def test_the_power_iteration_bounds_the_largest_eigenvalue() -> None:
    x, _ = problem(columns=50)
    gram = x.T @ x
    exact = largest_eigenvalue(gram)
    assert exact <= largest_eigenvalue(gram, exact_up_to=10) <= 1.02 * exact
