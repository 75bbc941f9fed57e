"""Which batch norm stands right behind which layer.

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
from typing import Any

from torch import fx, nn

from .copying import copy_without_hooks
from .filters import BatchNorm, filter_dim
from .tracing import as_call, module_path, op_name, trace


def pair_by_graph(model: nn.Module, example_inputs: Any) -> dict[str, str]:
    """Layer -> the batch norm that alone reads its output, from the exported graph."""
    args, kwargs = as_call(example_inputs)
    pairs: dict[str, str] = {}
    several: set[str] = set()
    first = {id(m): n for n, m in reversed(list(model.named_modules()))}

    def canonical(path: str) -> str:
        return first[id(model.get_submodule(path))]

    # A copy: what a forward keeps would stay in the model as a tensor without data.
    for node in trace(copy_without_hooks(model), args, kwargs).nodes:
        if node.op != "call_function" or op_name(node) != "batch_norm":
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function" or len(source.users) != 1:
            continue
        layer, norm = canonical(module_path(source)), canonical(module_path(node))
        if _fits(model.get_submodule(layer), model.get_submodule(norm)):
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
