"""The regions of a graph, as one graph: `with torch.autocast(...)` and `with torch.enable_grad()` in a forward become
graphs of their own in what `torch.export` returns, and would hide all channels in them.

What a region changes (dtypes, what is recorded for a backward pass) says nothing about channels: its ops are walked as
if they stood outside. It is for looking at only; nothing runs it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


def inlined(module: GraphModule) -> Graph:
    """The module's graph with the ops of its regions in their places; the graph itself if it has none."""
    if not any(_is_region(node) for node in module.graph.nodes):
        return module.graph
    graph = Graph()
    values: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            graph.node_copy(node, values.__getitem__).meta.update(node.meta)
        else:
            values[node] = _copied(graph, module, node, values.__getitem__)
    for node in list(reversed(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return graph


def _is_region(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") in _REGIONS


def _copied(graph: Graph, module: GraphModule, node: Node, value_of: Callable[[Node], Any]) -> Any:
    """The node in `graph`; of a region, and of what is taken from it, the results of its ops."""
    if node.target is operator.getitem and node.op == "call_function":
        taken = value_of(node.args[0]) if isinstance(node.args[0], Node) else None
        if isinstance(taken, tuple | list):
            index: Any = node.args[1]
            return taken[index]
    if not _is_region(node):
        return graph.node_copy(node, value_of)
    at = next(i for i, a in enumerate(node.args) if isinstance(a, Node) and a.op == "get_attr")
    inner_module = module.get_submodule(str(node.args[at].target))  # type: ignore[union-attr]
    assert isinstance(inner_module, GraphModule)
    given = iter(map_arg(node.args[at + 1 :], value_of))
    values: dict[Node, Any] = {}
    for inner in inner_module.graph.nodes:
        if inner.op == "placeholder":
            values[inner] = next(given)
        elif inner.op == "output":
            return map_arg(inner.args[0], values.__getitem__)
        else:
            values[inner] = _copied(graph, inner_module, inner, values.__getitem__)
    return ()
