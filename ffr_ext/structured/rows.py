"""Batches in which inputs or labels are missing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Returned by :func:`split`.

    Attributes:
        paired: (x, y) of the rows that have both. x_all: all inputs. y_all: all labels. Each may have no rows.
    """

    paired: tuple[Tensor, Tensor]
    x_all: Tensor
    y_all: Tensor


def split(x: Tensor, y: Tensor) -> Split:
    """Take a batch apart in which a row of NaN means that the input or the label is missing.

    ::

        (x_p, y_p), x_all, y_all = split(x, y)
        loss = tasks.loss(x=x_all, y=y_all)
        if len(x_p):                                  # a mean over no rows would be NaN
            loss = loss + F.mse_loss(model(x_p), y_p)

    Equals, with ``missing = t.flatten(1).isnan().all(1)``, ``(x[~mx & ~my], y[~mx & ~my]), x[~mx], y[~my]``. Rows
    without both are in none of the three. ``x``: (B, ...), ``y``: (B, ...), floating point. The convention is
    that of Belharbi et al.'s program.

    Raises:
        TypeError: no floating-point tensor. ValueError: different B, rows without elements, or a row of which a
            part is NaN.
    """
    missing_x, missing_y = _missing("x", x), _missing("y", y)
    if len(x) != len(y):
        raise ValueError(f"x, y: expected as many rows, got {len(x)} and {len(y)}")
    if x.device != y.device:
        raise ValueError(f"x, y: expected one device, got {x.device} and {y.device}")
    paired = ~(missing_x | missing_y)
    return Split((x[paired], y[paired]), x[~missing_x], y[~missing_y])


def _missing(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.dim() < 2 or tensor[:1].numel() == 0 < len(tensor):
        raise ValueError(f"{name}: expected rows of shape (B, ...), got shape {tuple(tensor.shape)}")
    nan = (
        tensor.isnan().reshape(len(tensor), -1) if len(tensor) else tensor.new_zeros((0, 1), dtype=torch.bool)
    )
    some, every = nan.any(1), nan.all(1)
    broken = (some & ~every).nonzero()
    if len(broken):
        row = int(broken[0])
        raise ValueError(
            f"{name}: expected rows that are NaN as a whole or not at all, got {int(nan[row].sum())} of "
            f"{nan.shape[1]} NaN in row {row}"
        )
    return every
