"""Errors of facial landmarks, and the curve of how many faces are below an error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# An error that is the threshold but for rounding counts as under it. In units of the dtype's eps: 68 points and
# one distance of coordinates around 1 are right to a few.
_ROUNDING = 16


def landmark_errors(
    predicted: Tensor,
    target: Tensor,
    box: Tensor | None = None,
    left: int | Sequence[int] = 36,
    right: int | Sequence[int] = 45,
) -> Tensor:
    """Normalised root mean square errors, as the field calls the mean distance over points by the distance of the
    eyes::

        (predicted - target).norm(dim=-1).mean(-1) / (target[:, left] - target[:, right]).norm(dim=-1)

    Args:
        predicted, target: (B, points, 2) or (B, 2 points) as x, y, x, y, ...; in any unit if both axes have the
            same.
        box: (B, 4) of x0, y0, x1, y1 of the crops in pixels. Needed when a crop that is not square was stretched to
            a square: coordinates are multiplied by its width and height first.
        left, right: the two points between which the eyes' distance is taken, counted from 0. 36 and 45 are
            the outer corners of 68 points: the *inter-ocular* distance of 300-W (points 37 and 46 counted from
            1). Errors by the *inter-pupil* distance, the means of six points each
            (``left=range(36, 42), right=range(42, 48)``), are larger numbers for the same prediction: compare only
            what was divided by the same.

    Returns:
        (B,) errors, 0.1 = a tenth of the eyes' distance.

    Raises:
        TypeError: no floating-point tensors. ValueError: shapes that do not fit, a point that is not there, NaN or
            infinity, an empty box, or two eyes at one place.
    """
    predicted, target = _points("predicted", predicted), _points("target", target)
    if predicted.shape != target.shape:
        raise ValueError(
            f"predicted: expected the points of target, {tuple(target.shape)}, got {tuple(predicted.shape)}"
        )
    if box is not None:
        sides = _sides(box, target)
        predicted, target = predicted * sides, target * sides
    eyes = (_eye("left", left, target) - _eye("right", right, target)).norm(dim=-1)
    if not bool((eyes > 0).all()):
        face = int((eyes <= 0).nonzero()[0])
        raise ValueError(f"target: expected eyes apart, got left and right at one place in face {face}")
    return (predicted - target).norm(dim=-1).mean(-1) / eyes


class Cumulative(NamedTuple):
    """Returned by :func:`cumulative`: ``share`` of the errors at or under ``at``, and ``area`` under the curve of
    shares by ``until``; both in [0, 1]."""

    share: float
    area: float


def cumulative(
    errors: Tensor | Sequence[float], at: float = 0.1, until: float = 0.5, step: float = 1e-3
) -> Cumulative:
    """The share of errors at or under ``at``, and the area under that share as a function of the threshold.

    ::

        share = (errors <= at).mean()                          area = curve.mean(), in units of ``until``
        curve = [(errors <= t).mean() for t in step / 2, 3 step / 2, ... until - step / 2]

    The area is 1 if all errors are 0, 0 if all are past ``until``. Published areas differ by their ``until``
    (0.05 to 0.5) and, by up to ``step / until``, by the step and rule of integration: this is the midpoint rule,
    which is exact for errors on the grid; Belharbi et al.'s program takes the mean of Simpson's and the trapezoid
    rule over [0, 0.5) in steps of 0.001. An error that is ``at`` but for rounding of its dtype counts as at it.

    Args:
        errors: 1-D, one per face, >= 0, as from :func:`landmark_errors`.
        at, until, step: thresholds in the errors' unit; ``until`` a whole number of steps.

    Raises:
        TypeError: no numbers. ValueError: no errors, NaN, negative ones, thresholds that are not positive.
    """
    values = _errors(errors)
    for name, value in (("at", at), ("until", until), ("step", step)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number > 0, got {value!r}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a number > 0, got {value}")
    cells = round(until / step)
    if cells < 1 or abs(cells * step - until) > 1e-6 * until:
        raise ValueError(f"step: expected a whole number of steps up to {until}, got {step}")
    share = (values <= at * (1 + _ROUNDING * torch.finfo(values.dtype).eps)).double().mean()
    middles = (torch.arange(cells, dtype=torch.float64) + 0.5) * step
    under = torch.searchsorted(values.double().sort().values, middles, right=True)
    return Cumulative(float(share), float(under.double().mean() / len(values)))


def _points(name: str, points: Any) -> Tensor:
    if not isinstance(points, Tensor) or not points.is_floating_point():
        kind = points.dtype if isinstance(points, Tensor) else type(points).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {kind}")
    if points.dim() == 2 and points.shape[1] % 2 == 0:
        points = points.reshape(len(points), points.shape[1] // 2, 2)
    if points.dim() != 3 or points.shape[2] != 2:
        raise ValueError(f"{name}: expected shape (B, points, 2) or (B, 2 points), got {tuple(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    kept: Tensor = points
    return kept


def _sides(box: Any, target: Tensor) -> Tensor:
    if not isinstance(box, Tensor):
        raise TypeError(f"box: expected a tensor, got {type(box).__name__}")
    if box.shape != (len(target), 4):
        raise ValueError(f"box: expected shape {(len(target), 4)}, got {tuple(box.shape)}")
    sides = (box[:, 2:] - box[:, :2]).to(target)
    if not bool((sides > 0).all()):
        raise ValueError("box: expected x0 < x1 and y0 < y1, got an empty box")
    return sides[:, None, :]


def _eye(name: str, which: Any, target: Tensor) -> Tensor:
    indices = [which] if isinstance(which, int) else list(which)
    count = target.shape[1]
    if not indices or any(
        isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < count for i in indices
    ):
        raise ValueError(f"{name}: expected points from 0 to {count - 1}, got {which!r}")
    return target[:, indices].mean(1)


def _errors(errors: Any) -> Tensor:
    values = errors if isinstance(errors, Tensor) else torch.as_tensor(errors, dtype=torch.float64)
    values = values.detach().cpu()
    if not values.is_floating_point():
        raise TypeError(f"errors: expected floating-point numbers, got {values.dtype}")
    if values.dim() != 1 or not len(values):
        raise ValueError(f"errors: expected one per face, shape (B,) with B > 0, got {tuple(values.shape)}")
    if not bool((values >= 0).all()):
        raise ValueError("errors: expected numbers >= 0, got NaN or negative ones")
    return values
