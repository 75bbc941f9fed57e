"""Dead filters of a network: counting them, and cutting them out for good."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from ffr_ext import Compaction, LayerSparsity, compact, sparsity, zero_small_filters

DEAD = 1e-2  # effective scale under which a filter counts as dead


def convolutions(model: nn.Module, threshold: float = DEAD) -> list[LayerSparsity]:
    """Every convolution with its batch norm: all filters, and those of an effective scale at or below
    ``threshold``."""
    return [layer for layer in sparsity(model, threshold) if layer.norm is not None]


@dataclass
class Pruned:
    """A trained network, the same with its dead filters set to exact zeros, and the smaller network that
    equals that."""

    filters: list[LayerSparsity]
    zeroed: nn.Module
    zero_weights: int
    compaction: Compaction

    @property
    def dead(self) -> int:
        return sum(layer.zero_filters for layer in self.filters)

    @property
    def total(self) -> int:
        return sum(layer.filters for layer in self.filters)


def prune(model: nn.Module, examples: Tensor, threshold: float = DEAD) -> Pruned:
    """Zero the dead filters of a copy of ``model``, then cut out all that exact zeros allow; ``model``
    stays as it is."""
    filters = convolutions(model, threshold)
    zeroed = copy.deepcopy(model).eval()
    zero_small_filters(zeroed, threshold)
    return Pruned(filters, zeroed, sparsity(zeroed).zero_weights, compact(zeroed, examples))
