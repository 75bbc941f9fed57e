"""Proximal maps of the penalties of single weights and of groups, and the penalties themselves.

Sources: the published code of nonconvex sparse group lasso (Bui, Park, Zhang, Qi, Xin; Front. Appl. Math. Stat.
6:529564, 2021) for the maps; that the split problem of that code is a Moreau envelope is our derivation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice
from .base import finite

# Of single weights: what `SparseGroupLasso` takes as `sparse`.
SPARSE_KINDS = ("l0", "l1", "transformed_l1", "scad", "l1_l2")
KINDS = (*SPARSE_KINDS, "group")

_DEFAULTS: dict[str, dict[str, float]] = {
    "transformed_l1": {"a": 1.0},
    "scad": {"a": 3.7},
    "l1_l2": {"alpha": 1.0},
}


def prox(kind: str, x: Tensor, t: float, **parameters: float) -> Tensor:
    """The proximal map of a penalty: ``argmin_u  (u - x)^2 / 2 + t r(u)``.

    ================== ================================================= =========================================
    ``kind``           t r(u)                                            the map
    ================== ================================================= =========================================
    "l0"               t per u that is not 0                             x where abs(x) > sqrt(2 t), else 0
    "l1"               t abs(u)                                          sign(x) max(abs(x) - t, 0)
    "transformed_l1"   t (a + 1) abs(u) / (a + abs(u)), a = 1            0 up to a threshold, then the root of a cubic
    "scad"             SCAD with lambda = t, a = 3.7                     soft threshold up to 2 t, x from a t on
    "l1_l2"            t (norm_1(u) - alpha norm_2(u)), alpha = 1        of ``x`` as a whole
    "group"            t norm_2(u)                                       x max(0, 1 - t / norm_2(x)), as a whole
    ================== ================================================= =========================================

    Args:
        kind: One of the above. The last two take ``x`` as one vector, the others every entry by itself.
        x: A floating-point tensor of any shape; half types are computed in float32.
        t: A finite number of at least 0.
        parameters: ``a`` (above 0 for the transformed l1, above 2 for SCAD) or ``alpha`` (in 0 .. 1).

    Returns:
        A new tensor like ``x``. What is cut off is exactly 0. NaN stays NaN. Not differentiable.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or a number is none.
        ValueError: an unknown kind or parameter, or one out of range.
    """
    check_choice("kind", kind, KINDS)
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a floating-point tensor, got {got}")
    threshold = non_negative("t", t)
    options = check_parameters(kind, parameters)
    with torch.no_grad():
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        return _MAPS[kind](wide, threshold, **options).to(x.dtype)


def penalty(kind: str, u: Tensor, t: float, **parameters: float) -> Tensor:
    """``t r(u)`` of `prox`, summed over ``u``: a 0-dim tensor."""
    return _PENALTIES[kind](u, t, **check_parameters(kind, parameters))


def envelope(kind: str, x: Tensor, weight: float, beta: float, **parameters: float) -> Tensor:
    """``sum min_u  beta (x - u)^2 / 2 + weight r(u)``: the Moreau envelope, a 0-dim tensor.

    Its gradient is ``beta (x - prox(x))``. For "l0" it is the capped ridge ``min(beta x^2 / 2, weight)``.
    """
    u = prox(kind, x, weight / beta, **parameters)
    return beta * ((x - u).square().sum() / 2 + penalty(kind, u, weight / beta, **parameters))


def check_parameters(kind: str, parameters: dict[str, Any]) -> dict[str, float]:
    """The parameters of a kind, defaults filled in."""
    known = _DEFAULTS.get(kind, {})
    for name in parameters:
        if name not in known:
            raise ValueError(f"{name}: {kind!r} has no such parameter; it has {', '.join(known) or 'none'}")
    options = {name: finite(name, parameters.get(name, default)) for name, default in known.items()}
    least = {"transformed_l1": 0.0, "scad": 2.0}.get(kind)
    if least is not None and options["a"] <= least:
        raise ValueError(f"a: expected more than {least:g} for {kind!r}, got {options['a']:g}")
    if kind == "l1_l2" and not 0 <= options["alpha"] <= 1:
        raise ValueError(f"alpha: expected a number in 0 .. 1, got {options['alpha']:g}")
    return options


def non_negative(name: str, value: Any) -> float:
    number = finite(name, value)
    if number < 0:
        raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
    return number


# Comparisons below are such that NaN, for which all are false, is kept and not cut off.


def _l0(x: Tensor, t: float) -> Tensor:
    return torch.where(x.abs() <= math.sqrt(2 * t), 0.0, x)


def _l1(x: Tensor, t: float) -> Tensor:
    return torch.where(x.abs() <= t, 0.0, x - t * x.sign())


def _transformed_l1(x: Tensor, t: float, a: float) -> Tensor:
    threshold = t * (a + 1) / a if t <= a * a / (2 * (a + 1)) else math.sqrt(2 * t * (a + 1)) - a / 2
    magnitude = x.abs()
    phi = torch.arccos((1 - 27 * t * a * (a + 1) / (2 * (a + magnitude) ** 3)).clamp(-1, 1))
    root = 2 / 3 * (a + magnitude) * torch.cos(phi / 3) - 2 * a / 3 + magnitude / 3
    return torch.where(magnitude <= threshold, 0.0, x.sign() * root)


def _scad(x: Tensor, t: float, a: float) -> Tensor:
    magnitude = x.abs()
    between = ((a - 1) * x - x.sign() * a * t) / (a - 2)
    return torch.where(magnitude <= 2 * t, _l1(x, t), torch.where(magnitude <= a * t, between, x))


def _l1_l2(x: Tensor, t: float, alpha: float) -> Tensor:
    if x.numel() == 0:
        return x.clone()
    flat = x.flatten()
    largest, at = flat.abs().max(0)
    soft = _l1(flat, t)
    many = soft * (1 + alpha * t / torch.linalg.vector_norm(soft))
    one = torch.zeros_like(flat).index_put_((at,), flat[at].sign() * (largest + (alpha - 1) * t))
    small = torch.where(largest <= (1 - alpha) * t, 0.0, one)
    return torch.where(
        largest > t, many, torch.where(largest.isnan(), x.new_tensor(math.nan), small)
    ).view_as(x)


def _group(x: Tensor, t: float) -> Tensor:
    norm = torch.linalg.vector_norm(x)
    return torch.where(norm <= t, 0.0, x * (1 - t / norm))


_MAPS: dict[str, Callable[..., Tensor]] = {
    "l0": _l0,
    "l1": _l1,
    "transformed_l1": _transformed_l1,
    "scad": _scad,
    "l1_l2": _l1_l2,
    "group": _group,
}


def _scad_penalty(u: Tensor, t: float, a: float) -> Tensor:
    magnitude = u.abs()
    between = (2 * a * t * magnitude - magnitude**2 - t * t) / (2 * (a - 1))
    flat = torch.full_like(u, t * t * (a + 1) / 2)
    return torch.where(magnitude <= t, t * magnitude, torch.where(magnitude > a * t, flat, between)).sum()


_PENALTIES: dict[str, Callable[..., Tensor]] = {
    "l0": lambda u, t: t * (u != 0).to(u.dtype).sum(),
    "l1": lambda u, t: t * u.abs().sum(),
    "transformed_l1": lambda u, t, a: t * ((a + 1) * u.abs() / (a + u.abs())).sum(),
    "scad": _scad_penalty,
    "l1_l2": lambda u, t, alpha: t * (u.abs().sum() - alpha * torch.linalg.vector_norm(u)),
    "group": lambda u, t: t * torch.linalg.vector_norm(u),
}
