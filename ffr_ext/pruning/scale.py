"""The effective scale of a filter: how much of it is left, whatever is rescaled around it.

Behind a batch norm it is |gamma| sqrt(var / (var + eps)), the standard deviation of its channel after the
norm. Scaling the filter, or its inputs, together with the norm's statistics changes nothing there. (|gamma|
||W|| / sqrt(var + eps) would
change: weight decay shrinks W and var together, and so it finds dead filters by chance.) Without a norm it is
the filter's L2 norm. A filter of zeros has scale 0 in any case.

Which batch norm stands right behind which layer.

`pair_by_graph` knows: it looks at the exported graph. `pair_by_structure` has no inputs to trace with. It
tries `torch.fx.symbolic_trace`, which needs none, on the model and, where the model's own forward cannot be
traced so, on its parts. What is left (a forward with control flow that calls its layers itself) is paired by
the order of registration, and only where that leaves no doubt: the norm is registered right behind the layer,
in the same parent, with as many channels, and does not fit the layer's inputs as well unless the names agree
(conv1 and bn1, or no number in either). Where there is doubt there is no pair, and the filter is judged by
its L2 norm.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..models import as_call
from .filters import BatchNorm, Layer, filter_dim
from .graph.groups import ChannelGroups
from .graph.states import on_cpu
from .graph.trace import module_path, op_name, trace_copy
from .norms import filter_norms


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


@on_cpu
def channel_scales(groups: ChannelGroups, layers: list[Layer]) -> tuple[Tensor, Tensor]:
    """The squared effective scale of every channel group, (groups,) in float64, and whether a batch norm decides it.

    Of a channel that several layers make, the sum of theirs; of one that a depthwise convolution passes on, no more
    than is left behind that (both ours: the effective scale is that of a filter).
    """
    weights = {
        name: layer for layer in layers for name in [f"{layer.name}.weight" if layer.name else "weight"]
    }
    scales = {layer.name: scale for layer, scale in zip(layers, effective_scales(layers), strict=True)}
    made = torch.zeros(len(groups), dtype=torch.float64)
    passed = torch.full_like(made, torch.inf)
    behind_norm = torch.zeros(len(groups), dtype=torch.bool)
    for axis in groups.axes:
        layer = weights.get(axis.name)
        if axis.role != "out" or layer is None:
            continue
        member = axis.groups >= 0
        squares = scales[layer.name].double().square().cpu()[member]
        if axis.makes_channels:
            made.index_add_(0, axis.groups[member], squares)
            behind_norm[axis.groups[member]] |= layer.norm is not None
        else:
            passed.scatter_reduce_(0, axis.groups[member], squares, "amin")
    return torch.minimum(made, passed), behind_norm


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


def pair_by_graph(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Layer -> the batch norm that alone reads its output, from the exported graph."""
    args, kwargs = as_call(example_inputs)
    pairs: dict[str, str] = {}
    several: set[str] = set()
    first = {id(m): n for n, m in reversed(list(model.named_modules()))}

    modules = dict(model.named_modules(remove_duplicate=False))

    def canonical(path: str) -> str | None:
        """None for a module that the forward makes, as `self.layers[:2]` does."""
        return first[id(modules[path])] if path in modules else None

    for node in trace_copy(model, args, kwargs).nodes:
        if node.op != "call_function" or op_name(node) != "batch_norm":
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) != 1:
            continue
        layer, norm = canonical(module_path(source)), canonical(module_path(node))
        if layer is None or norm is None:
            continue
        if _fits(modules[layer], modules[norm]):
            if pairs.get(layer, norm) != norm or norm in {n for k, n in pairs.items() if k != layer}:
                several.add(layer)
            pairs[layer] = norm
    return {k: n for k, n in pairs.items() if k not in several}


def pair_by_structure(model: nn.Module) -> dict[str, str]:
    """Layer -> the batch norm behind it, without running anything."""
    pairs: dict[str, str] = {}
    _pair_below(model, "", pairs)
    names = list(pairs.values())
    return {k: n for k, n in pairs.items() if names.count(n) == 1}


def _pair_below(module: nn.Module, path: str, pairs: dict[str, str]) -> None:
    children = list(module.named_children())
    if not children:
        return
    traced = _symbolic_graph(module)
    prefix = f"{path}." if path else ""
    if traced is not None:
        modules = dict(module.named_modules())
        called = [n.target for n in traced.nodes if n.op == "call_module"]
        for node in traced.nodes:
            source = node.args[0] if node.args else None
            if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
                continue
            once = called.count(node.target) == called.count(source.target) == 1 and len(source.users) == 1
            if once and _fits(modules[str(source.target)], modules[str(node.target)]):
                pairs[prefix + str(source.target)] = prefix + str(node.target)
        return
    for (a, layer), (b, norm) in itertools.pairwise(children):
        if _fits(layer, norm) and (_suffix(a) == _suffix(b) or not _fits_inputs(layer, norm)):
            pairs[prefix + a] = prefix + b
    for name, child in children:
        _pair_below(child, prefix + name, pairs)


class _LayerTracer(fx.Tracer):
    """Layers of a subclass that a library defines are layers as well."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        # Looked up beforehand: inside a trace a weight is a proxy and no tensor.
        self._layers = {
            id(m) for m in module.modules() if filter_dim(m) is not None or isinstance(m, BatchNorm)
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._layers or super().is_leaf_module(m, module_qualified_name)


def _symbolic_graph(module: nn.Module) -> fx.Graph | None:
    try:
        return _LayerTracer(module).trace(module)
    # Control flow on values, *args, and whatever else a forward may do: the caller has another way.
    except Exception:
        return None


def _fits(layer: nn.Module, norm: nn.Module) -> bool:
    dim = filter_dim(layer)
    if dim is None or not isinstance(norm, BatchNorm):
        return False
    weight: Any = layer.weight
    return int(weight.shape[dim]) == norm.num_features


def _fits_inputs(layer: nn.Module, norm: nn.Module) -> bool:
    """The norm could as well stand in front of the layer."""
    inputs = getattr(layer, "in_channels", getattr(layer, "in_features", None))
    return isinstance(norm, BatchNorm) and inputs == norm.num_features


def _suffix(name: str) -> str:
    digits = re.search(r"\d+$", name)
    return digits[0] if digits else ""
