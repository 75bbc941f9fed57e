"""Experts whose weights lie in one tensor [experts, ..], as one layer for each expert.

`grouped_mm(x, weight, offsets)` and `bmm(weight[ids], x)` multiply each row by the weight of its expert. Hidden unit i
of one expert has nothing to do with hidden unit i of another: so for the walk each expert gets a layer of its own, the
ops up to the next such product are repeated for each, and `one_of` says that a row of the result is that of one of
them. The graph is for looking at only; nothing runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ... import _torch
from .trace import TracedGraph, module_path, op_name, out_of_place_name

_OPS = torch.ops.aten

# torch's grouped_mm takes tensors whose strides are multiples of this.
GROUPED_BYTES = 16


def one_of(*tensors: Tensor) -> Tensor:
    """Each row of the result is that row of one of the tensors. Its rule is in `rules/routing`."""
    raise NotImplementedError("one_of is looked at only")


@dataclass(frozen=True)
class _Product:
    """One op that multiplies every row by the weight of its expert."""

    weight: Node  # the placeholder of [experts, ..]
    rows: Node
    outputs_first: bool  # the weight of an expert is [outputs, inputs]
    column: int | None  # where the rows have a dimension of size 1 more: bmm


def unrolled(graph: TracedGraph) -> TracedGraph:
    """The graph with a layer for each expert; the same graph if it has no experts of that kind."""
    products = {n: p for n in graph.nodes if (p := _product(graph, n)) is not None}
    products = _with_weights_of_their_own(graph, products)
    return _Unrolling(graph, products, _regions(products)).result() if products else graph


# ------------------------------------------------------------------------------------------------------------
# Which ops are products with the weights of experts, and what lies between two of them
# ------------------------------------------------------------------------------------------------------------


def _product(graph: TracedGraph, node: Node) -> _Product | None:
    if node.op != "call_function":
        return None
    name, args = op_name(node), [a for a in node.args if isinstance(a, Node)]
    if "grouped_mm" in name and len(args) == 3 and args[0].meta["val"].dim() == 2:
        weight, turned = _turned(args[1])
        return _Product(weight, args[0], turned, None) if _is_stack(graph, weight) else None
    if name == "bmm":
        for which, column in ((0, 2), (1, 1)):
            taken, turned = _turned(args[which])
            stack, rows = _stack_of(taken), args[1 - which]
            if stack is not None and _is_stack(graph, stack) and rows.meta["val"].shape[column] == 1:
                return _Product(stack, rows, (which == 0) != turned, column)
    return None


def _passes_on(node: Node) -> bool:
    """A weight behind it is the same weight, turned or of another dtype."""
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return False
    if op_name(node) == "transpose":
        return node.meta["val"].dim() == 3 and sorted(d % 3 for d in node.args[1:3]) == [1, 2]  # type: ignore[operator]
    return op_name(node) in ("to", "contiguous")


def _turned(node: Node) -> tuple[Node, bool]:
    """What a weight is, and whether its last two dimensions were exchanged."""
    turned = False
    while _passes_on(node):
        turned ^= op_name(node) == "transpose"
        (node,) = node.all_input_nodes
    return node, turned


def _is_stack(graph: TracedGraph, node: Node) -> bool:
    return node in graph.tensor_names and node.meta["val"].dim() == 3 and node.meta["val"].shape[0] > 1


def _stack_of(node: Node) -> Node | None:
    """The tensor that a node takes one entry of for every row: stack[ids]."""
    if node.op != "call_function" or op_name(node) != "index":
        return None
    stack, indices = node.args[0], node.args[1]
    if not isinstance(stack, Node) or not isinstance(indices, list | tuple) or len(indices) != 1:
        return None
    return stack if isinstance(indices[0], Node) and indices[0].meta["val"].dim() == 1 else None


def _with_weights_of_their_own(graph: TracedGraph, products: dict[Node, _Product]) -> dict[Node, _Product]:
    """The products whose weights nothing else reads. (A tied weight has one placeholder for each name.)"""
    names = list(graph.tensor_names.values())
    while True:
        kept = {
            n: p
            for n, p in products.items()
            if names.count(graph.tensor_names[p.weight]) == 1
            and _ends_in_products(p.weight, p.weight, products)
        }
        if len(kept) == len(products):
            return kept
        products = kept


def _ends_in_products(node: Node, weight: Node, products: dict[Node, _Product]) -> bool:
    """Every way from the weight ends in a product with it."""
    return all(
        products[user].weight is weight
        if user in products
        else (_passes_on(user) or _stack_of(user) is weight) and _ends_in_products(user, weight, products)
        for user in node.users
    )


def _regions(products: dict[Node, _Product]) -> dict[Node, set[Node]]:
    """For each product that ends one: itself, and the nodes between it and the products before it."""
    regions: dict[Node, set[Node]] = {}
    begun: dict[Node, set[Node]] = {}  # node -> what lies between the first products of its region and itself
    ended: set[Node] = set()
    for node in _in_order(products):
        own = {n for a in _operands(node, products) for n in begun.get(a, ())}
        if node in products:
            if own:
                regions[node] = own | {node}
                ended.add(node)
            else:
                begun[node] = {node}
        elif own:
            begun[node] = own | {node}
    for node in products.keys() - ended:
        if not any(node in region for region in regions.values()):
            regions[node] = {node}
    inside: set[Node] = set()
    for end, region in regions.items():
        leaves = any(u not in region and not _only_looks(u) for n in region if n is not end for u in n.users)
        mixes = not all(n in products or _keeps_rows_apart(n) for n in region)
        if region & inside or leaves or mixes:
            return {n: {n} for n in products}  # what an expert computes goes another way as well
        inside |= region
    return regions


_KEEPS_ROWS = {"to", "contiguous", "clone", "dropout", "getitem", "view", "reshape", "unsqueeze", "squeeze"}
_ALONG_A_DIMENSION = {"chunk", "split", "split_with_sizes", "slice", "glu", "softmax"}


def _keeps_rows_apart(node: Node) -> bool:
    """Row i of the result is made from the rows i of the inputs: so a copy for one expert says what its rows are."""
    values = [v for v in _torch.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    sources = [s for n in node.all_input_nodes for s in _torch.tree_leaves(n.meta.get("val"))]
    rows = {s.shape[0] for s in sources if isinstance(s, Tensor) and s.dim() > 1}
    if not values or any(v.dim() < 2 or {v.shape[0]} != rows for v in values):
        return False
    name = out_of_place_name(node)
    if name in _ALONG_A_DIMENSION:
        dim = _argument(node, "dim")
        return isinstance(dim, int) and dim % sources[0].dim() != 0
    return name in _KEEPS_ROWS or torch.Tag.pointwise in getattr(node.target, "tags", [])


def _argument(node: Node, wanted: str) -> Any:
    for index, argument in enumerate(getattr(_torch.schema(node.target), "arguments", [])):
        if argument.name == wanted:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(wanted)
            return argument.default_value if given is None else given
    return None


def _only_looks(node: Node) -> bool:
    """An assertion, which nothing comes of."""
    return node.op == "call_function" and not node.users and node.meta.get("val") is None


def _operands(node: Node, products: dict[Node, _Product]) -> list[Node]:
    return [products[node].rows] if node in products else node.all_input_nodes


def _in_order(products: dict[Node, _Product]) -> Iterator[Node]:
    node = next(iter(products), None)
    yield from () if node is None else node.graph.nodes


# ------------------------------------------------------------------------------------------------------------
# The graph with a layer for each expert
# ------------------------------------------------------------------------------------------------------------


class _Unrolling:
    def __init__(
        self, graph: TracedGraph, products: dict[Node, _Product], regions: dict[Node, set[Node]]
    ) -> None:
        self.old, self.products, self.regions = graph, products, regions
        self.inside = {n for region in regions.values() for n in region}
        self.stacks = self._stacks()
        self.graph = Graph()
        self.values: dict[Node, Node] = {}
        self.slices: dict[tuple[Node, int], Node] = {}
        self.tensor_names: dict[Node, str] = {}
        self.tensors: dict[str, Tensor] = {}

    def _stacks(self) -> dict[Node, str]:
        """The weights, and what else is taken by expert and nowhere else: biases."""
        weights = {p.weight for p in self.products.values()}
        return {
            node: name
            for node, name in self.old.tensor_names.items()
            if node in weights
            or (
                bool(node.users)
                and node.meta["val"].dim() > 1
                and list(self.old.tensor_names.values()).count(name) == 1
                and all(_stack_of(u) is node and u.users.keys() <= self.inside for u in node.users)
            )
        }

    def result(self) -> TracedGraph:
        old, beside = self.old, self._beside()
        last = [n for n in old.nodes if n.op == "placeholder"][-1]
        for node in old.nodes:
            if node in self.regions:
                self._end(node)
            elif node not in self.inside and node not in beside and not _only_looks(node):
                self.values[node] = self._copy(node, self.values.__getitem__)
            if node is last:
                self._make_slices()
        names = {self.values[n]: name for n, name in old.tensor_names.items() if n not in self.stacks}
        stacked = set(self.stacks.values())
        return replace(
            old,
            nodes=list(self.graph.nodes),
            tensor_names={**names, **self.tensor_names},
            tensors={**{n: t for n, t in old.tensors.items() if n not in stacked}, **self.tensors},
            constants={self.values[n]: t for n, t in old.constants.items()},
            experts=old.experts | {module_path(n) for n in self.products},
            multiples={
                self.stacks[p.weight]: GROUPED_BYTES // p.weight.meta["val"].element_size()
                for p in self.products.values()
                if p.column is None
            },
            stacks={
                name: [f"{name}[{e}]" for e in range(node.meta["val"].shape[0])]
                for node, name in self.stacks.items()
            },
        )

    def _beside(self) -> set[Node]:
        """The stacks, and what lies between them and where they are used."""
        found = set(self.stacks)
        for node in self.old.nodes:
            if node.op == "call_function" and node not in self.inside and found & {*node.all_input_nodes[:1]}:
                found.add(node)
        return found

    def _make_slices(self) -> None:
        for stack, name in self.stacks.items():
            for expert, tensor in enumerate(self.old.tensors[name].detach().unbind(0)):
                node = self.graph.placeholder(f"{stack.name}_{expert}")
                node.meta["val"] = tensor
                self.slices[stack, expert] = node
                self.tensor_names[node] = f"{name}[{expert}]"
                self.tensors[f"{name}[{expert}]"] = tensor

    def _end(self, end: Node) -> None:
        """The region of a product once for each expert, and one of the results."""
        region = [n for n in self.old.nodes if n in self.regions[end]]
        results = [self._of_expert(region, e) for e in range(self.products[end].weight.meta["val"].shape[0])]
        self.values[end] = self._call(end, one_of, tuple(results), end.meta["val"])

    def _of_expert(self, region: list[Node], expert: int) -> Node:
        own: dict[Node, Node] = {}

        def value_of(node: Node) -> Node:
            if node in own:
                return own[node]
            stack = _stack_of(node)
            return self.values[node] if stack not in self.stacks else self.slices[stack, expert]

        for node in region:
            layer = node in self.products
            own[node] = self._layer(node, expert, value_of) if layer else self._copy(node, value_of)
        return own[region[-1]]

    def _layer(self, node: Node, expert: int, value_of: Callable[[Node], Node]) -> Node:
        product = self.products[node]
        weight, rows, value = self.slices[product.weight, expert], value_of(product.rows), node.meta["val"]
        if product.column is not None:
            flat = rows.meta["val"].squeeze(product.column)
            rows = self._call(node, _OPS.squeeze.dim, (rows, product.column), flat)
            value = value.squeeze(product.column)
        target = _OPS.linear.default if product.outputs_first else _OPS.mm.default
        made = self._call(node, target, (rows, weight), value)
        if product.column is None:
            return made
        return self._call(node, _OPS.unsqueeze.default, (made, product.column), node.meta["val"])

    def _copy(self, node: Node, value_of: Callable[[Node], Node]) -> Node:
        copied = self.graph.node_copy(node, value_of)
        copied.meta.update(node.meta)
        return copied

    def _call(self, like: Node, target: Any, args: tuple[Any, ...], value: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta.update(like.meta)
        node.meta["val"] = value
        return node
