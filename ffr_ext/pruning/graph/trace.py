"""The graph that compaction walks: `torch.export` of the model in eval mode, with module paths and parameter
names."""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ... import _torch
from ...models import (
    OUT_OF_MEMORY,
    all_tensors,
    canonical_names,
    copy_without_hooks,
    evaluating,
    output_tensors,
)
from .inline import inlined
from .packed import unpacked

# Stands for every size that depends on values, as how many tokens an expert gets: prime, and no usual size.
UNKNOWN_SIZE = 101


@dataclass
class TracedGraph:
    """Nodes in the order of execution; for a placeholder the tensor it stands for."""

    nodes: list[Node]
    tensor_names: dict[Node, str]  # placeholder -> name of its parameter or buffer, one name for tied ones
    tensors: dict[str, Tensor]
    name_of: dict[str, str]  # every name of a parameter or buffer -> its one name in `tensors`
    modules: dict[str, nn.Module]
    constants: dict[Node, Tensor] = field(default_factory=dict)  # placeholder -> a tensor made in forward
    assumed: bool = False  # some rows are there wherever values say how many
    experts: set[str] = field(default_factory=set)  # modules whose children values choose among
    parts: set[str] = field(
        default_factory=set
    )  # of those, the ones that read one tensor of all experts part by part
    # A tensor of all experts -> its parts in `tensors`, and what its sizes have to be multiples of.
    stacks: dict[str, list[str]] = field(default_factory=dict)
    multiples: dict[str, int] = field(default_factory=dict)


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedGraph:
    """Export the model in eval mode. ValueError with the reason where `torch.export` cannot."""
    assumed = False
    try:
        exported = _export(model, args, kwargs)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        again = _export_with_rows(model, args, kwargs) if _looks_at_values(error) else None
        if again is None:
            raise ValueError(
                f"torch.export could not trace {type(model).__name__} with these example_inputs, so nothing is known "
                f"about its channels: {_reason(error, model)}"
            ) from error
        exported, assumed = again, True
    signature = exported.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = canonical_names(model)
    tensors = dict(all_tensors(model))
    graph = TracedGraph(
        list(inlined(exported.graph_module).nodes),
        {},
        {n: tensors[n] for n in dict.fromkeys(names.values())},
        names,
        dict(model.named_modules(remove_duplicate=False)),
    )
    graph.assumed = assumed
    lifted = signature.inputs_to_lifted_tensor_constants
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in named:
            graph.tensor_names[node] = names[named[node.name]]
        elif node.name in lifted:
            graph.constants[node] = exported.constants[lifted[node.name]]
    _give_sizes(graph)
    return graph


def trace_copy(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TracedGraph:
    """`trace` of a copy: what a forward keeps would stay in the model as a tensor without data."""
    graph = trace(copy_without_hooks(model), args, kwargs)
    check_own_tensors(graph, model)
    return graph


def check_own_tensors(graph: TracedGraph, source: nn.Module) -> None:
    """ValueError where a copy of `source`, whose graph this is, computes with the tensors of `source` itself."""
    of_source = {t.data_ptr(): name for name, t in all_tensors(source) if t.numel()}
    shared = [of_source[t.data_ptr()] for t in graph.constants.values() if t.data_ptr() in of_source]
    if shared:
        more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
        raise ValueError(
            f"model: a copy of {type(source).__name__} computes with {', '.join(shared[:3])}{more} of the original: it "
            "keeps a function that refers to the original's modules, which copying does not replace. Take it off "
            "first: a forward that was wrapped, as model.forward = torch.compile(model.forward) does, or a lambda that "
            "calls self"
        )


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with evaluating(model), _returning_tensors(model):
        return torch.export.export(model, args, kwargs, strict=False)


def _export_with_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `_export`, with at least one row wherever values say how many (`if rows.numel() == 0: continue`); None where
    that is not enough."""
    with evaluating(model), _returning_tensors(model, _torch.AssumeRows):
        try:
            return torch.export.export(model, args, kwargs, strict=False)
        except OUT_OF_MEMORY:
            raise
        except Exception:
            return None


@contextlib.contextmanager
def _returning_tensors(
    model: nn.Module, inside: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
) -> Iterator[None]:
    """Inside, the model returns a list of the tensors it gives: torch.export refuses classes that no pytree knows, such
    as the caches of language models."""
    own, forward = vars(model).get("forward"), model.forward

    @functools.wraps(forward)
    def returning(*args: Any, **kwargs: Any) -> list[Tensor]:
        with inside(), unpacked(model), _torch.masks_as_given(), _casts_to_what_is():
            return output_tensors(forward(*args, **kwargs))

    model.forward = returning
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextlib.contextmanager
def _casts_to_what_is() -> Iterator[None]:
    """Inside, a module that the forward casts to the dtype and device that it has (as routers of experts do with
    `self.classifier.to(self.dtype)`) is left alone: while torch.export traces, torch cannot exchange its parameters."""
    cast = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        # How images lie in memory makes no difference to what is traced.
        wanted = {name: value for name, value in kwargs.items() if name != "memory_format"} | {"copy": False}
        tensors = [t for _, t in all_tensors(module)]
        same = all(t.to(*args, **wanted) is t for t in tensors if t.is_floating_point())
        return module if same else cast(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = cast  # type: ignore[method-assign]


def _give_sizes(graph: TracedGraph) -> None:
    """Every tensor gets a shape of numbers. What works on nothing but as many rows as values say are the experts of a
    mixture."""
    routed: set[str] = set()
    others: set[str] = set()
    for node in graph.nodes:
        values = [v for v in _torch.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
        if node.op != "call_function" or not values:
            continue
        depends = any(_depends_on_values(v) for v in values)
        (routed if depends else others).update(re.sub(r"@\d+", "", path) for path in module_paths(node))
        if depends:
            node.meta["val"] = _torch.map_tensors(_with_sizes, node.meta["val"])
        if depends and any(_is_part_of_a_stack(graph, source) for source in node.all_input_nodes):
            graph.experts.add(module_path(node))
            graph.parts.add(module_path(node))
    for path in routed - others:
        container = path.rpartition(".")[0]
        if isinstance(graph.modules.get(container), nn.ModuleList | nn.ModuleDict):
            graph.experts.add(container)


def _is_part_of_a_stack(graph: TracedGraph, node: Node) -> bool:
    """stack[0] of a parameter [experts, .., ..]."""
    if node.op != "call_function" or op_name(node) != "select" or node.args[1] != 0:
        return False
    (stack,) = node.all_input_nodes
    return stack in graph.tensor_names and stack.meta["val"].dim() == 3


def _depends_on_values(value: Tensor) -> bool:
    return not all(isinstance(size, int) for size in value.shape)


def _with_sizes(value: Tensor) -> Tensor:
    if not _depends_on_values(value):
        return value
    shape = [_torch.size_of(size, UNKNOWN_SIZE) for size in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")


# What errors of torch.export have in common where the forward looks at the values of a tensor, and what helps.
_LOOKS_AT_VALUES = re.compile("data-dependent|DataDependent|unbacked|dynamic shape operator")
_REMEDY = (
    "the forward code branches on, or sizes a tensor by, the values of a tensor: take that out of the forward, call it "
    "with options that avoid it, or compact the submodule that holds the layers"
)

_REMEDY_OF_NONE = (
    "the model runs on them, but while torch.export traces, libraries leave out what they make otherwise, such as the "
    "mask of a call without one: give it in example_inputs (attention_mask=, decoder_attention_mask= of transformers)"
)


_OURS = Path(__file__).parents[2]  # of this package: modes that watch the trace


def _looks_at_values(error: Exception) -> bool:
    return _LOOKS_AT_VALUES.search(f"{type(error).__name__} {error}") is not None


def _reason(error: Exception, model: nn.Module) -> str:
    """The first sentence of an error of torch.export, the line of the model's code it is about, and what helps."""
    text = str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    first = re.split(r"(?<=[.!])\s|\s+\(Size-like", first)[0]
    said = f"{type(error).__name__}: {first}{_place(error, model)}"
    if _looks_at_values(error):
        return f"{said}; {_REMEDY}"
    return f"{said}; {_REMEDY_OF_NONE}" if "NoneType" in first else said


def _place(error: Exception, model: nn.Module) -> str:
    """The line of the model's code where it happened: as torch.export names it, or the innermost one in a file that
    defines one of the model's own modules."""
    for at in re.finditer(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.+)', str(error)):
        if not Path(at[1]).is_relative_to(_OURS):
            return f" ({Path(at[1]).name}:{at[2]}, in {at[3]}: {at[4].strip()})"
    kinds = {type(m) for m in model.modules() if not type(m).__module__.startswith("torch.")}
    files = {getattr(sys.modules.get(kind.__module__), "__file__", None) for kind in kinds}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files:
            return f" ({Path(frame.filename).name}:{frame.lineno}, in {frame.name}: {frame.line})"
    return ""


# What torch.export writes into the path where the forward calls the layers of a part of a Sequential, which keep their
# names: `for layer in self.layers[:-1]`.
_PART = re.compile(r"\.slice\([^)]*\)")


def module_path(node: Node) -> str:
    """The path of the innermost module whose forward made this node; "" is the model itself."""
    # A module called a second time has the path "name@1".
    return re.sub(r"@\d+", "", (module_paths(node) or [""])[-1])


def module_paths(node: Node) -> list[str]:
    """The paths of all modules the node is inside of, outermost first, calls told apart ("name@1")."""
    stack = node.meta.get("nn_module_stack") or {}
    return [_PART.sub("", entry[0]) for entry in stack.values()]


def op_name(node: Node) -> str:
    """ "conv2d" for aten.conv2d.default, "getitem" for operator.getitem."""
    schema = _torch.schema(node.target)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    name = schema.name
    return name.removeprefix("aten::")


def out_of_place_name(node: Node) -> str:
    """`op_name`, without the underscore of an op in place. (Tags say which those are from torch 2.13 on.)"""
    name = op_name(node)
    arguments = getattr(_torch.schema(node.target), "arguments", [])
    writes = bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
    return name.removesuffix("_") if writes and not name.endswith("__") else name


def where(node: Node) -> str:
    """How messages name a node: its op, and the module it is in."""
    path = module_path(node)
    return f"{op_name(node)} in {path}" if path else f"{op_name(node)} in the model's own forward"
