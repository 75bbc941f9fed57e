"""The effective scale of a filter: how much of it is left, whatever is rescaled around it.

Behind a batch norm it is |gamma| sqrt(var / (var + eps)), the standard deviation of its channel after the
norm. Scaling the filter, or its inputs, together with the norm's statistics changes nothing there. (|gamma|
||W|| / sqrt(var + eps) would
change: weight decay shrinks W and var together, and so it finds dead filters by chance.) Without a norm it is
the filter's L2 norm. A filter of zeros has scale 0 in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .filters import Layer, filter_dim
from .norms import filter_norms
from .pairing import pair_by_graph, pair_by_structure


def find_layers(model: nn.Module, example_inputs: Any = None) -> list[Layer]:
    """Every layer with filters, once, with the batch norm behind it.

    With `example_inputs` the exported graph says which norm that is: the one whose input is the layer's
    output and nothing else reads. Without them `pair_by_structure` reads it off the modules.
    """
    pairs = pair_by_structure(model) if example_inputs is None else pair_by_graph(model, example_inputs)
    layers = []
    for name, module in model.named_modules():
        dim = filter_dim(module)
        if dim is None:
            continue
        norm_name = pairs.get(name)
        norm = model.get_submodule(norm_name) if norm_name is not None else None
        layers.append(Layer(name, module, dim, norm_name, norm))
    return layers


def effective_scales(layers: list[Layer]) -> list[Tensor]:
    """One tensor of scales per layer, on its device, in float32 or float64; all filter norms in one
    launch."""
    norms = filter_norms([layer.weight.detach() for layer in layers], 2, [layer.dim for layer in layers])
    return [_scale(layer, norm) for layer, norm in zip(layers, norms, strict=True)]


@dataclass(frozen=True)
class SmallFilters:
    """Which of a layer's parameters make filters at or below a threshold: what layers share is small where each of
    them says so, since zeros in it are zeros in all of them.

    Attributes:
        rows: Filters of the weight, a bool for each.
        gammas: Elements of the batch norm's gamma; all False without one.
    """

    rows: Tensor
    gammas: Tensor

    @property
    def filters(self) -> Tensor:
        return self.rows | self.gammas


def small_filters(layers: list[Layer], scales: list[Tensor], threshold: float) -> list[SmallFilters]:
    """For each layer, from its effective scales."""
    small = [scale <= threshold for scale in scales]
    weights = [layer.weight for layer in layers]  # alive at once, so that no two have one address
    rows = _in_all([(id(weight), layer.dim) for weight, layer in zip(weights, layers, strict=True)], small)
    gammas = _in_all([id(layer if layer.gamma is None else layer.gamma) for layer in layers], small)
    return [
        SmallFilters(row, torch.zeros_like(row) if layer.gamma is None else gamma)
        for row, gamma, layer in zip(rows, gammas, layers, strict=True)
    ]


def _in_all(keys: list[Any], masks: list[Tensor]) -> list[Tensor]:
    """Each mask and those of the same key."""
    shared: dict[Any, Tensor] = {}
    for key, mask in zip(keys, masks, strict=True):
        shared[key] = shared[key] & mask if key in shared else mask
    return [shared[key] for key in keys]


def without_repeats(layers: list[Layer], filters: list[Tensor]) -> list[Tensor]:
    """The masks `filters`, without what an earlier layer has already: the filters of a tied weight, unless a gamma of
    their own comes behind them."""
    kept: list[Tensor | None] = []  # no address is used twice while all live
    seen: dict[tuple[int, int], Tensor] = {}
    gammas: set[int] = set()
    masks = []
    for layer, mask in zip(layers, filters, strict=True):
        weight, gamma = layer.weight, layer.gamma
        kept += [weight, gamma]
        key = id(weight), layer.dim
        before = seen.get(key)
        seen[key] = mask if before is None else mask | before
        repeats = before is not None and (gamma is None or id(gamma) in gammas)
        masks.append(mask & ~before if repeats and before is not None else mask)
        if gamma is not None:
            gammas.add(id(gamma))
    return masks


def _scale(layer: Layer, norms: Tensor) -> Tensor:
    norm: Any = layer.norm
    if norm is None:
        return norms
    scale = torch.ones_like(norms) if norm.weight is None else norm.weight.detach().to(norms.dtype).abs()
    if norm.running_var is not None:  # else the batch's own variance, far above eps: a factor of 1
        variance = norm.running_var.to(norms.dtype)
        scale = scale * (variance / (variance + norm.eps)).sqrt()
    return torch.where(norms == 0, torch.zeros_like(scale), scale)
