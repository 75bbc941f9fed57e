"""The ways of `train.py` to a smaller network: what each penalises while it trains, and what each cuts by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ffr_ext.pruning import Compaction, prune_to, synthesize
from ffr_ext.regularizers import OutInChannelLasso, ScaleLasso, SparseGroupLasso, Stress

METHODS = (
    *("ffr+slimming", "ffr+group-lasso", "ffr"),
    *("group-lasso", "sgl-l0", "oicsr", "stress", "slimming", "none"),
)

# Starting points for the digits; other data and learning rates want a sweep.
WEIGHTS = {
    "ffr+slimming": 2e-2,
    "ffr+group-lasso": 2e-3,
    "group-lasso": 2e-5,
    "sgl-l0": 2e-5,
    "oicsr": 1e-3,
    "slimming": 1e-3,
}
FFR_WEIGHTS = {"ffr+slimming": 2.0, "ffr+group-lasso": 2.0, "ffr": 3.0}  # of length and curvature each

# By what `prune_to` ranks channels: what the penalty drives down.
ENERGIES = {"ffr+slimming": "scale", "ffr": "scale", "slimming": "scale", "oicsr": "paper"}


def make_regularizer(method: str, model: nn.Module, x: Tensor, weight: float = 0.0) -> Any:
    """A regularizer of weights, or None for a method without one; `weight` 0 takes the method's own."""
    weight = weight or WEIGHTS.get(method, 0.0)
    if method == "ffr+slimming":
        return ScaleLasso(model, weight=weight)
    if method == "ffr+group-lasso":
        return SparseGroupLasso(model, weight=weight, sparse=None)
    if method == "slimming":
        return ScaleLasso(model, weight=weight, form="prox")
    if method in ("group-lasso", "sgl-l0"):
        sparse = "l0" if method == "sgl-l0" else None
        return SparseGroupLasso(
            model, weight=weight, sparse=sparse, groups="coupled", example_inputs=x, form="prox"
        )
    if method == "oicsr":
        return OutInChannelLasso(model, x, weight=weight)
    return Stress(model, x) if method == "stress" else None


def make_smaller(
    method: str,
    model: nn.Module,
    x: Tensor,
    share: float,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> list[Compaction]:
    """Cuts, one after another, to the share of the FLOPs that is given: the weakest channels leave. Stress first draws
    the next generation, and takes the weakest for what it lacks."""
    cuts: list[Compaction] = []
    if method == "stress":
        cuts.append(synthesize(model, x, optimizer=optimizer, generator=generator, measure=False))
        before, after = cuts[0].report.flops
        share = min(1.0, share * before / after)
        model = cuts[0].model
    energy = ENERGIES.get(method, "effective")
    cuts.append(prune_to(model, x, flops=share, energy=energy, optimizer=optimizer, measure=False))
    return cuts


def cut_epochs(epochs: int, rounds: int) -> list[int]:
    """After which epochs the network is cut: evenly spread, with as many epochs behind the last as between two."""
    return [max(1, round(epochs * k / (rounds + 1))) for k in range(1, rounds + 1)]
