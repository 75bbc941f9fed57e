"""`localization`: does a heatmap find a mask? Other scores are Quantus's (see `Explanation.for_quantus`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Localization:
    """Intersection over union of {heat >= t} and the mask.

    Attributes:
        thresholds: (T,), t as a share of each heatmap's largest value.
        curves: (B, T), the IoU of each image.
        curve: (T,), their mean.
        iou: The curve's largest value: one threshold for all images.
        threshold: Where that is.
        auc: The curve's mean.
        iou_best: Mean of each image's best; this threshold knows the mask.
    """

    thresholds: Tensor
    curves: Tensor

    @property
    def curve(self) -> Tensor:
        return self.curves.mean(0)

    @property
    def iou(self) -> float:
        return float(self.curve.max())

    @property
    def threshold(self) -> float:
        return float(self.thresholds[int(self.curve.argmax())])

    @property
    def auc(self) -> float:
        return float(self.curve.mean())

    @property
    def iou_best(self) -> float:
        return float(self.curves.amax(1).mean())


def localization(heat: Tensor, mask: Tensor, thresholds: int = 40) -> Localization:
    """IoU of heatmaps with masks at thresholds 1/41 .. 40/41 of each heatmap's largest value.

    Args:
        heat: (B, ...), not negative. A map of zeros scores 0.
        mask: (B, ...) bool, or numbers 0 and 1.

    Raises:
        ValueError: shapes differ, heat is negative, NaN or infinite, or a mask is empty.
    """
    if heat.shape != mask.shape or heat.dim() < 2 or not len(heat):
        raise ValueError(
            f"heat, mask: expected the same shape (B, ...), got {tuple(heat.shape)} and {tuple(mask.shape)}"
        )
    if not bool(heat.isfinite().all()) or bool((heat < 0).any()):
        raise ValueError("heat: expected finite values of at least 0; take abs() or clamp(min=0) first")
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask: expected bool, or numbers 0 and 1")
        mask = mask == 1
    inside = mask.flatten(1)
    empty = (~inside.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask: the masks of images {empty[:8]} are empty, so there is nothing to find")
    flat = heat.detach().flatten(1)
    flat = flat.double() if flat.device.type != "mps" else flat.cpu().double()
    inside = inside.to(flat.device)
    largest = flat.amax(1, keepdim=True)
    flat = torch.where(largest > 0, flat / largest.clamp(min=torch.finfo(flat.dtype).tiny), 0.0)
    steps = torch.arange(1, thresholds + 1, dtype=flat.dtype, device=flat.device) / (thresholds + 1)
    curves = torch.stack([_iou(flat >= step, inside) for step in steps], 1)
    return Localization(steps.cpu(), curves.cpu())


def _iou(found: Tensor, inside: Tensor) -> Tensor:
    return (found & inside).sum(1).double() / (found | inside).sum(1)
