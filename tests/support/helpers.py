"""The tolerance rule of the loss tests, and features to test with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffr_ext import ffr_loss, reference


class LossAndGrads(NamedTuple):
    loss: Tensor
    grads: list[Tensor | None]


def loss_and_grads(features: Sequence[Tensor], upstream: float = 1.0, **options: Any) -> LossAndGrads:
    """`ffr_loss` of leaf copies of `features` (same strides) and the gradient of each that requires grad."""
    leaves = [f.detach().requires_grad_(f.requires_grad) for f in features]
    loss = ffr_loss(leaves, **options)
    if loss.requires_grad:
        (upstream * loss).backward()
    return LossAndGrads(loss.detach(), [leaf.grad for leaf in leaves])


def reference_in(
    dtype: torch.dtype, features: Sequence[Tensor], upstream: float = 1.0, **options: Any
) -> LossAndGrads:
    """The reference with features and all arithmetic in `dtype`, eagerly."""
    options.pop("backend", None)
    options = {k: torch.tensor(v, dtype=dtype) if isinstance(v, list) else v for k, v in options.items()}
    leaves = [f.detach().to(dtype).requires_grad_(f.requires_grad) for f in features]
    loss = reference.ffr_loss(leaves, **options)
    if loss.requires_grad:
        (upstream * loss).backward()
    return LossAndGrads(loss.detach(), [leaf.grad for leaf in leaves])


def assert_no_worse_than_torch(features: Sequence[Tensor], upstream: float = 1.0, **options: Any) -> None:
    """The loss and every gradient are as near to the float64 truth as plain torch in the features' own dtype is.

    "Plain torch" casts to float32, computes eagerly, and rounds the gradient once: the best that dtype can give. Eight
    units in the last place are allowed on top: of the loss, and for gradients of the largest one, because a gradient is
    a sum of up to six addends that can cancel.
    """
    truth = reference_in(torch.float64, features, upstream, **options)
    ours = loss_and_grads(features, upstream, **options)
    eager = loss_and_grads(features, upstream, **{**options, "backend": "reference"})
    _assert_near(ours.loss, eager.loss, truth.loss, truth.loss.abs().item(), "loss")
    largest = max((t.abs().max().item() for t in truth.grads if t is not None and t.numel()), default=0.0)
    for index, (a, b, t) in enumerate(zip(ours.grads, eager.grads, truth.grads, strict=True)):
        assert (a is None) == (t is None), (
            f"features[{index}]: gradient {'missing' if a is None else 'not asked for'}"
        )
        if a is not None and b is not None and t is not None:
            assert a.dtype == features[index].dtype
            _assert_near(a, b, t, largest, f"gradient of features[{index}]")


def _assert_near(ours: Tensor, eager: Tensor, truth: Tensor, scale: float, name: str) -> None:
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    error, unavoidable = ((x.double() - truth).abs().max().item() for x in (ours, eager))
    allowed = unavoidable + 8 * torch.finfo(ours.dtype).eps * scale
    assert error <= allowed, f"{name}: error {error:.3g}; plain torch in {ours.dtype} has {unavoidable:.3g}"


def random_features(
    *shapes: Sequence[int], dtype: torch.dtype = torch.float32, requires_grad: bool = True
) -> list[Tensor]:
    """Standard normal features."""
    return [torch.randn(*s, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for s in shapes]


def features_with_ties(*shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Features after a ReLU, rounded to quarters: many exact zeros and many equal neighbours."""
    return [
        (torch.randn(*s, dtype=torch.float64).relu().mul(4).round() / 4).to(dtype).requires_grad_()
        for s in shapes
    ]


def map_features(features: Iterable[Tensor], change: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Apply a change of layout to the values, keeping each a leaf with its own requires_grad."""
    return [change(f.detach()).detach().requires_grad_(f.requires_grad) for f in features]
