"""The mu-lasso: least squares with a bound on the sum of the weights, for all classes at once."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

_CHECK_EVERY = 20
_LARGEST_SUPPORT = (
    1000  # of a class whose weights are solved for; a pseudo-inverse of this size takes a second
)


class Solution(NamedTuple):
    """Weights (Q, classes); the duality gap of each class, an upper bound of what is still to gain; iterations."""

    weights: Tensor
    gap: Tensor
    iterations: int


def mu_lasso(
    gram: Tensor,
    cross: Tensor,
    mu: float,
    *,
    positive: bool = True,
    squares: Tensor | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 20_000,
) -> Solution:
    """Minimise 1/2 ||X w - l||^2 for each column l of L, with sum |w| <= mu, and w >= 0 if ``positive``.

    Accelerated projected gradient (FISTA, Beck and Teboulle 2009; restarted column by column, O'Donoghue and Candes
    2015) that stops at a relative duality gap, which bounds the distance from the optimum (Jaggi 2013). The shares of
    each layer sum to 1, so X^T X is singular and the last digits would take 10^5 steps: now and then the equations on
    the support it has found are solved, and the solution is taken where its gap is smaller.

    Args:
        gram: X^T X (Q, Q), float64.
        cross: X^T L (Q, classes).
        mu: The bound, > 0.
        squares: ||l||^2 of each column, what ``tolerance`` is relative to; default: the largest of ``cross``.
        max_iterations: Where it ends with a warning that says the gap.
    """
    scale = 0.5 * (cross.abs().amax(0) if squares is None else squares).clamp(
        min=torch.finfo(cross.dtype).tiny
    )
    step = 1 / max(largest_eigenvalue(gram), torch.finfo(gram.dtype).tiny)
    w = torch.zeros_like(cross)
    gradient = gram @ w - cross
    y, y_gradient = w, gradient
    momentum = torch.ones_like(scale)
    gap = _gap(w, gradient, mu, positive)
    iteration = 0
    while bool((gap > tolerance * scale).any()) and iteration < max_iterations:
        iteration += 1
        following = _project(y - step * y_gradient, mu, positive)
        moved = following - w
        restart = ((y - following) * moved).sum(0) > 0
        larger = torch.where(restart, 1.0, 0.5 * (1 + (1 + 4 * momentum.square()).sqrt()))
        speed = torch.where(restart, 0.0, (momentum - 1) / larger)
        following_gradient = gram @ following - cross
        # Linear in w, so the gradient at y needs no product of its own.
        y = following + speed * moved
        y_gradient = following_gradient + speed * (following_gradient - gradient)
        w, gradient, momentum = following, following_gradient, larger
        if iteration % _CHECK_EVERY == 0:
            gap = _gap(w, gradient, mu, positive)
            solved = _project(_on_support(gram, cross, w, mu, gap > tolerance * scale), mu, positive)
            solved_gradient = gram @ solved - cross
            solved_gap = _gap(solved, solved_gradient, mu, positive)
            better = solved_gap < gap
            w, y = torch.where(better, solved, w), torch.where(better, solved, y)
            gradient = torch.where(better, solved_gradient, gradient)
            y_gradient = torch.where(better, solved_gradient, y_gradient)
            gap, momentum = torch.where(better, solved_gap, gap), torch.where(better, 1.0, momentum)
    if bool((gap > tolerance * scale).any()):
        worst = int((gap / scale).argmax())
        warnings.warn(
            f"mu_lasso: stopped after {max_iterations} iterations at a duality gap of {gap[worst].item():.3g} "
            f"(class {worst}; {(gap / scale)[worst].item():.1e} of half its sum of squares); raise max_iterations",
            RuntimeWarning,
            stacklevel=3,
        )
    return Solution(w, gap, iteration)


def _gap(w: Tensor, gradient: Tensor, mu: float, positive: bool) -> Tensor:
    """<gradient, w - s> at the vertex s of the constraint set where it is largest."""
    steepest = (-gradient).amax(0).clamp(min=0) if positive else gradient.abs().amax(0)
    return (gradient * w).sum(0) + mu * steepest


def _on_support(gram: Tensor, cross: Tensor, w: Tensor, mu: float, unfinished: Tensor) -> Tensor:
    """For each unfinished class the least squares over the features that have a weight, on the bound if ``w`` is."""
    solved = w.clone()
    for j in unfinished.nonzero().flatten().tolist():
        support = w[:, j].nonzero().flatten()
        count = len(support)
        if not 0 < count <= _LARGEST_SUPPORT:
            continue
        bound = float(w[:, j].abs().sum()) > mu * (1 - 1e-9)
        matrix = gram.new_zeros(count + bound, count + bound)
        matrix[:count, :count] = gram[support][:, support]
        right = cross[support, j]
        if bound:  # the sum is mu; the last unknown is its multiplier
            matrix[count, :count] = matrix[:count, count] = w[support, j].sign()
            right = torch.cat([right, right.new_tensor([mu])])
        solved[support, j] = (torch.linalg.pinv(matrix, hermitian=True) @ right)[:count]
    return solved


def _project(w: Tensor, mu: float, positive: bool) -> Tensor:
    """The nearest point, column by column, with sum |w| <= mu (and w >= 0): by sorting (Duchi et al. 2008)."""
    size = w.clamp(min=0) if positive else w.abs()
    ordered = size.sort(0, descending=True).values
    count = torch.arange(1, len(w) + 1, dtype=w.dtype, device=w.device)[:, None]
    level = (ordered.cumsum(0) - mu) / count
    kept = (ordered > level).sum(0, keepdim=True).clamp(min=1)
    shrink = torch.where(size.sum(0) > mu, level.gather(0, kept - 1)[0], 0.0)
    smaller = (size - shrink).clamp(min=0)
    return smaller if positive else smaller * w.sign()


def largest_eigenvalue(gram: Tensor, exact_up_to: int = 4096) -> float:
    """Of a symmetric positive semidefinite matrix; 1 % above the power iteration's where it is large."""
    if len(gram) <= exact_up_to:
        return float(torch.linalg.eigvalsh(gram)[-1])
    vector = torch.ones(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(100):  # entries of X^T X are >= 0, so this start is never orthogonal to the answer
        vector = gram @ (vector / vector.norm())
    return 1.01 * float(vector.norm())
