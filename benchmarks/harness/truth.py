"""The loss and its gradients in float64, made sample by sample so that the largest cases fit in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ffr_ext import reference

_CHUNK_ELEMENTS = (
    1 << 26
)  # of all features together, in float64 and with the reference's temporaries about 4 GB
_KEPT_ELEMENTS = 1 << 27  # of the gradients; of larger ones only the first and the last samples are compared


class Truth:
    """What `reference.ffr_loss` gives in float64 on `features`, whose batches are all the same.

    Every norm adds up over samples, so the loss is a sum over chunks of the batch, each with weights that
    divide by the whole batch, and the gradient of a chunk is that chunk of the gradient.
    """

    def __init__(self, features: Sequence[Tensor], options: dict[str, Any]) -> None:
        batch = features[0].shape[0]
        if any(f.shape[0] != batch for f in features):
            raise ValueError("features: expected one batch size")
        per_sample = sum(f[:1].numel() for f in features)
        chunk = max(1, min(batch, _CHUNK_ELEMENTS // per_sample))
        kept = max(1, min(batch, _KEPT_ELEMENTS // per_sample) // 2)
        starts = range(0, batch, chunk)
        self.loss = 0.0
        self.slices: list[tuple[slice, list[Tensor]]] = []
        for start in starts:
            samples = slice(start, min(start + chunk, batch))
            compared = per_sample * batch <= _KEPT_ELEMENTS or start < kept or samples.stop > batch - kept
            loss, grads = _chunk_of_truth([f[samples] for f in features], batch, options, compared)
            self.loss += loss
            if compared:
                self.slices.append((samples, grads))

    def error(self, loss: Tensor, grads: Sequence[Tensor] | None) -> float:
        """Largest relative distance ||out - truth|| / ||truth|| among the loss and all gradients together."""
        worst = abs(loss.item() - self.loss) / max(abs(self.loss), 1e-300)
        if grads is not None:
            distance, norm = 0.0, 0.0
            for samples, expected in self.slices:
                for grad, wanted in zip(grads, expected, strict=True):
                    distance += (grad[samples].double() - wanted).square().sum().item()
                    norm += wanted.square().sum().item()
            error = math.sqrt(distance / max(norm, 1e-300))
            worst = error if not error <= worst else worst  # NaN stays
        return worst


def _chunk_of_truth(
    features: list[Tensor], batch: int, options: dict[str, Any], with_gradients: bool
) -> tuple[float, list[Tensor]]:
    """Loss and gradients of some samples of a batch of `batch`."""
    leaves = [f.detach().double().requires_grad_(with_gradients) for f in features]
    options = {"norm": "l1", "curvature_kind": "difference", "reduction": "mean", **options}
    norm, kind = options["norm"], options["curvature_kind"]
    with torch.set_grad_enabled(with_gradients):
        lengths, bends = reference.flow_terms(leaves, norm=norm, curvature_kind=kind, reduction="sum")
        by_length, by_bend = _divisors(leaves, batch, norm, kind, options["reduction"])
        loss = options.get("gradient", 1.0) * (lengths / by_length).sum()
        loss = loss + options.get("curvature", 1.0) * (bends / by_bend).sum()
    grads = list(torch.autograd.grad(loss, leaves)) if with_gradients else []
    return loss.item(), grads


def _divisors(
    features: list[Tensor], batch: int, norm: str, curvature_kind: str, reduction: str
) -> tuple[Tensor, Tensor]:
    """What the sums of the terms are divided by (docs/design.md section 1)."""
    lengths, bends = [], []
    for stage in reference.split_stages(features):
        per_sample = stage[0][0].numel()
        mean = batch * (math.sqrt(per_sample) if norm == "l2" else per_sample)
        divisor = {"sum": 1, "batchmean": batch, "mean": mean}[reduction]
        lengths += [divisor] * (len(stage) - 1)
        angle = 1 if reduction == "sum" else batch
        bends += [angle if curvature_kind == "angle" else divisor] * max(len(stage) - 2, 0)
    new = features[0].new_tensor
    return new(lengths), new(bends)
