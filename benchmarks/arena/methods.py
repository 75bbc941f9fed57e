"""What is compared: each method is a list of regularizers for a strength, and a way to cut.

Every regularizer follows the protocol of `ffr_ext.regularizers.base`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from examples.common.models import LeNet5, flow_layers
from ffr_ext import FeatureFlow
from ffr_ext.regularizers import BaseRegularizer, OutInChannelLasso, ScaleLasso, SparseGroupLasso, Stress

# model, example, strength -> the regularizers of a step
Make = Callable[[nn.Module, Tensor, float], list[Any]]


@dataclass(frozen=True)
class Method:
    """One line of the table."""

    name: str
    kind: str  # what it acts on: the kind of pruning it is
    strengths: tuple[float, ...]  # those that are tried, the same number for every method that has one
    make: Make = field(repr=False)
    weight_decay: Callable[[float], float] | None = None  # instead of the recipe's, by strength
    synthesis: bool = False  # generations: what survives is drawn (StressedNets)
    ramp: float = 0.0  # share of the steps over which the penalty grows to its strength

    def refusal(self, model: nn.Module, example: Tensor) -> str:
        """Why it has nothing to do with such a network; empty where it has."""
        try:
            self.make(model, example, self.strengths[0])
        except ValueError as error:
            return str(error).splitlines()[0]
        return ""


def none(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    return []


def ffr(
    model: nn.Module,
    example: Tensor,
    strength: float,
    layers: Sequence[str] | None = None,
    shares: tuple[float, float] = (1.0, 1.0),
    **options: Any,
) -> list[Any]:
    """Feature flow regularization of the stem and the blocks; `shares` of the strength for length and curvature."""
    if isinstance(model, LeNet5):
        options["transition"] = "pool"
    flow = FeatureFlow(
        model,
        list(layers or flow_layers(model)),
        gradient=strength * shares[0],
        curvature=strength * shares[1],
        **options,
    )
    return [flow]


def slimming(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    return [ScaleLasso(model, weight=strength)]


def group_lasso(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    return [SparseGroupLasso(model, weight=strength, sparse=None)]


def sparse_group_lasso_l0(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    return [SparseGroupLasso(model, weight=strength, sparse="l0")]


def oicsr(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    return [OutInChannelLasso(model, example, weight=strength)]


def stress(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    return [Stress(model, example, attenuation=strength)]


class TorchPruning(BaseRegularizer):
    """Torch-Pruning's `GroupNormPruner.regularize`, somebody else's best, behind the same protocol."""

    def __init__(self, model: nn.Module, example: Tensor, weight: float) -> None:
        import torch_pruning

        super().__init__(model)
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.pruner = torch_pruning.pruner.GroupNormPruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            reg=weight,
            ignored_layers=heads[-1:],
        )
        self.pruner.update_regularizer()

    def add_gradients_(self) -> None:
        self.pruner.regularize(self.model)

    def loss(self) -> Tensor:
        """Its penalty is known by its gradient alone."""
        raise NotImplementedError


def torch_pruning(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    return [TorchPruning(model, example, strength)]


def together(first: Make, second: Make, second_share: float) -> Make:
    """Both at once; the second with a fixed part of the strength."""

    def make(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
        return [*first(model, example, strength), *second(model, example, strength * second_share)]

    return make


FEATURES = "features of blocks"

METHODS = {
    method.name: method
    for method in (
        Method("none", "nothing", (0.0,), none),
        Method(
            "weight-decay",
            "all weights",
            (1e-3, 2e-3, 1e-2, 3e-2),
            none,
            weight_decay=lambda strength: strength,
        ),
        Method("slimming", "scales", (3e-3, 1e-2, 2e-2, 4e-2), slimming),
        Method("group-lasso", "filters", (3e-4, 1e-3, 3e-3, 1e-2), group_lasso),
        Method("sgl-l0", "filters and weights", (3e-4, 1e-3, 3e-3, 1e-2), sparse_group_lasso_l0),
        Method("oicsr", "channels, out and in", (3e-4, 1e-3, 3e-3, 1e-2), oicsr),
        Method("ffr", FEATURES, (1.0, 3.0, 6.0, 12.0), ffr),
        Method("ffr+slimming", "features and scales", (0.5, 1.0, 2.0, 4.0), together(ffr, slimming, 1e-2)),
        Method(
            "ffr+group-lasso", "features and filters", (0.5, 1.0, 2.0, 4.0), together(ffr, group_lasso, 1e-3)
        ),
        Method("ffr+oicsr", "features and channels", (0.5, 1.0, 2.0, 4.0), together(ffr, oicsr, 1e-3)),
        Method("stressed-nets", "filters, drawn", (0.2, 0.5, 0.8, 0.95), stress, synthesis=True),
        Method("torch-pruning", "channels, coupled", (1e-4, 1e-3, 1e-2, 1e-1), torch_pruning),
    )
}
