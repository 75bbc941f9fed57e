"""The graph that compaction walks: `torch.export` of the model in eval mode, with module paths and parameter
names."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

# Says nothing of the model: never turned into an error that does.
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass
class TracedGraph:
    """Nodes in the order of execution; for a placeholder the tensor it stands for."""

    nodes: list[Node]
    tensor_names: dict[Node, str]  # placeholder -> name of its parameter or buffer, one name for tied ones
    tensors: dict[str, Tensor]
    name_of: dict[str, str]  # every name of a parameter or buffer -> its one name in `tensors`
    modules: dict[str, nn.Module]
    constants: dict[Node, Tensor] = field(default_factory=dict)  # placeholder -> a tensor made in forward

    def outputs(self) -> list[Node]:
        return [n for n in pytree.tree_leaves(self.nodes[-1].args) if isinstance(n, Node)]


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as the positional and keyword arguments of one call of the model."""
    for value in pytree.tree_leaves(example_inputs):
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
            kind = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
            raise ValueError(f"example_inputs: expected dense (strided) tensors, got {kind}")
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs: expected a tensor, a tuple of positional inputs or a dict of keyword inputs, "
        f"got {type(example_inputs).__name__}"
    )


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in eval mode and no gradients inside; every module's own mode afterwards."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name of every parameter and buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in all_tensors(model):
        names[name] = first.setdefault(id(tensor), name)
    return names


def all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedGraph:
    """Export the model in eval mode. ValueError with the reason where `torch.export` cannot."""
    with evaluating(model):
        try:
            exported = torch.export.export(model, args, kwargs, strict=False)
        except OUT_OF_MEMORY:
            raise
        except Exception as error:
            raise ValueError(
                f"torch.export could not trace {type(model).__name__} with these example_inputs, "
                "so nothing "
                f"is known about its channels: {type(error).__name__}: {error}"
            ) from error
    signature = exported.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = canonical_names(model)
    tensors = dict(all_tensors(model))
    graph = TracedGraph(
        list(exported.graph.nodes),
        {},
        {n: tensors[n] for n in dict.fromkeys(names.values())},
        names,
        dict(model.named_modules(remove_duplicate=False)),
    )
    lifted = signature.inputs_to_lifted_tensor_constants
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in named:
            graph.tensor_names[node] = names[named[node.name]]
        elif node.name in lifted:
            graph.constants[node] = exported.constants[lifted[node.name]]
    return graph


def module_path(node: Node) -> str:
    """The path of the innermost module whose forward made this node; "" is the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    # A module called a second time has the path "name@1".
    return re.sub(r"@\d+", "", path)


def module_paths(node: Node) -> list[str]:
    """The paths of all modules the node is inside of, outermost first, calls told apart ("name@1")."""
    stack = node.meta.get("nn_module_stack") or {}
    return [entry[0] for entry in stack.values()]


def op_name(node: Node) -> str:
    """ "conv2d" for aten.conv2d.default, "getitem" for operator.getitem."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    name = schema.name
    return name.removeprefix("aten::")


def out_of_place_name(node: Node) -> str:
    """`op_name`, without the underscore of an op in place. (Tags say which those are from torch 2.13 on.)"""
    name = op_name(node)
    arguments = getattr(getattr(node.target, "_schema", None), "arguments", [])
    writes = bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
    return name.removesuffix("_") if writes and not name.endswith("__") else name


def where(node: Node) -> str:
    """How messages name a node: its op, and the module it is in."""
    path = module_path(node)
    return f"{op_name(node)} in {path}" if path else f"{op_name(node)} in the model's own forward"
