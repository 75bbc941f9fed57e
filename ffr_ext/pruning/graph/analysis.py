"""One walk over the graph: the channels and the state of every tensor, and who reads which channel.

The walk itself knows no op. Each op has a rule (`rules_*.py`) that takes the flows of its inputs to those of
its outputs and records reads, constraints and pins here; an op without a rule pins every channel it touches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg

from ... import _torch
from . import states
from .channels import ChannelSets
from .registry import find_rule
from .states import State, on_cpu
from .trace import TracedGraph, op_name, where

Labels = Tensor | None

# A constant tensor above this many elements is not computed but called live: it is no per-channel constant.
MAX_FOLDED = 1 << 24


@dataclass(frozen=True)
class Flow:
    """What is known of one tensor of the graph: its shape, the labels of each dimension, and its values."""

    shape: tuple[int, ...]
    labels: tuple[Labels, ...]
    state: State
    name: str | None = None  # of the parameter or buffer this is
    # Where space is padded with zeros, or averaged with such padding: the state without it. Constants that differ there
    # are still one pattern in space, times their value.
    inner: State | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)


@dataclass
class Read:
    """An op that mixes channels, such as a convolution: output j is made from the inputs i with uses[j, i].

    Input i may be cut if no kept output uses it, or if it is a constant that the op loses nothing by: 0, or
    `absorbable`, which goes into the bias.
    """

    node: Node
    dim: int | None  # of the node's result: the outputs. None where they are not seen in it
    start: int  # the first of them, for a group of a convolution
    inputs: Tensor  # labels
    outputs: Tensor  # labels
    uses: Tensor  # bool [outputs, inputs]
    value: Tensor  # of each input
    live: Tensor  # bool: the input is no constant
    absorbable: Tensor  # bool: a constant other than 0 is the same as a bias
    refusal: str  # why one is not absorbable
    weight_sum: Callable[[], Tensor] | None = (
        None  # [outputs, inputs]: what an input of constant 1 adds to the outputs
    )
    bias: BiasTarget | None = None
    weight: WeightTarget | None = None
    silenced: Tensor = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.bool)
    )  # see Analysis._silenced

    @property
    def where(self) -> str:
        return where(self.node)


@dataclass(frozen=True)
class BiasTarget:
    """The bias that takes constants up: outputs offset.. of it belong to the read."""

    module: str
    name: str  # of the parameter; made if the module has none
    exists: bool
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class WeightTarget:
    """The parameter whose slices along `dim` belong to the inputs of a read; of a group, those of its outputs."""

    name: str
    dim: int
    rows: range | None = None  # the outputs of a group


@dataclass
class Constraint:
    """Parts of a dimension whose numbers of kept channels depend on each other.

    kind: "equal" (every part keeps as many: chunk), "whole" (a part stays or leaves as a whole: group norm),
    "grouped" (a convolution: see `inputs`).
    """

    kind: str
    where: str
    parts: list[Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    module: str | None = None  # whose number of groups changes with the parts that are left
    multiple: int = 1  # of "equal" parts: what is left of each is a multiple of it


class Analysis:
    """The walk. Everything it finds is in its public attributes."""

    @on_cpu
    def __init__(self, graph: TracedGraph, strict: bool) -> None:
        self.graph = graph
        self.strict = strict
        self.sets = ChannelSets()
        self.reads: list[Read] = []
        self.constraints: list[Constraint] = []
        self.unknown: dict[str, int] = {}  # "op in module" -> how often
        self.notes: list[str] = []
        self.flows: dict[Node, Any] = {}
        self.labels: dict[str, tuple[Labels, ...]] = {}  # of each parameter and buffer
        self.grouped_inputs: dict[str, list[Tensor]] = {}  # weight -> the input labels of each of its groups
        self.sized: list[
            tuple[str, str, Tensor]
        ] = []  # (module, attribute, labels it counts) with no tensor to tell
        # (module, labels of what its forward divides channels into): of all heads, or of the parts of a split
        self.divided: list[tuple[str, list[Tensor]]] = []
        self.out_axes: dict[str, int] = {}  # weight -> the dimension of its filters
        self.filters_of_computed: list[Tensor] = []  # labels of the filters of weights that are no parameters
        self._roots: dict[Node, Node] = {}
        self._shares: dict[Node, list[Node]] = defaultdict(list)
        self.made: dict[Node, Any] = {}  # the flows as the nodes made them, before anything wrote to them
        self._writes: dict[Node, list[int]] = defaultdict(
            list
        )  # root of a set of views -> where it is written to
        self.positions = {n: i for i, n in enumerate(graph.nodes)}
        for name, tensor in graph.tensors.items():
            self.labels[name] = tuple(self.sets.new(s) if s > 1 else None for s in tensor.shape)
        self._pin_torchs_attention()
        for node in graph.nodes:
            self._visit(node)
        for stack, parts in graph.stacks.items():
            for labels in zip(*(self.labels[name] for name in parts), strict=True):
                sizes = [v for v in labels if v is not None]
                if sizes:
                    said = f"the tensor of all experts {stack}"
                    multiple = graph.multiples.get(stack, 1)
                    self.constraints.append(Constraint("equal", said, sizes, multiple=multiple))
        for read in self.reads:
            read.silenced = torch.zeros_like(read.outputs, dtype=torch.bool)
            if read.dim is not None:
                own = slice(read.start, read.start + read.outputs.numel())
                read.silenced = self._silenced(read.node, read.dim)[own]

    def _pin_torchs_attention(self) -> None:
        """What an `nn.MultiheadAttention` cannot lose, said before anything else is found out about it."""
        reason = (
            "nn.MultiheadAttention takes one number, embed_dim, for its queries and for all heads together: neither "
            "can get smaller (heads of an attention made of linear layers can leave)"
        )
        inside = [(name, 0) for name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight")]
        inside += [("v_proj_weight", 0), ("out_proj.weight", 1), ("in_proj_weight", 1), ("q_proj_weight", 1)]
        for path, module in self.graph.modules.items():
            if type(module).forward is nn.MultiheadAttention.forward:
                for name, dim in inside:
                    own = self.graph.name_of.get(f"{path}.{name}" if path else name)
                    if own in self.labels:
                        self.sets.pin(self.labels[own][dim], reason)

    # ---------------------------------------------------------------------------------------------------
    # For the rules
    # ---------------------------------------------------------------------------------------------------

    def pin(self, flow: Flow, reason: str, dims: Sequence[int] | None = None) -> None:
        for dim in range(flow.rank) if dims is None else dims:
            self.sets.pin(flow.labels[dim], reason)

    def unify(self, a: Labels, b: Labels, reason: str) -> Labels:
        """One dimension of two tensors that are combined index by index."""
        if a is None or b is None:
            kept = a if a is not None else b
            self.sets.claim(kept)
            self.sets.pin(kept, reason)
            return kept
        if a is not b:
            self.sets.unify(a, b)
        return a

    def unchanged(self, node: Node, until: Node | None = None) -> bool:
        """Nothing writes to the node's memory after it is made (and before `until`)."""
        end = len(self.graph.nodes) if until is None else self.positions[until]
        return not any(self.positions[node] < w < end for w in self._writes[self._roots.get(node, node)])

    # ---------------------------------------------------------------------------------------------------
    # The walk
    # ---------------------------------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        if node.op == "placeholder":
            self.flows[node] = self.made[node] = self._placeholder(node)
        elif node.op == "call_function":
            self._call(node)
        elif node.op == "output":
            for flow in self._input_flows(node.args):
                self.pin(flow, "an output of the model")

    def _silenced(self, node: Node, dim: int) -> Tensor:
        """The indices of a node's result that everything behind it ignores: an op that keeps channels apart,
        such as a batch norm with a gamma of 0, makes constants of them, and nothing else looks at them
        before."""
        flow = self.made[node]
        silenced = torch.zeros(flow.shape[dim], dtype=torch.bool)
        while len(node.users) == 1:
            (node,) = node.users
            result = self.made.get(node)
            if not isinstance(result, Flow) or not keeps_channels_apart(node) or result.rank != flow.rank:
                break
            if result.shape[dim] != flow.shape[dim]:
                break
            silenced |= ~states.per_index(result.state, dim, result.shape[dim])[1]
        return silenced

    def _placeholder(self, node: Node) -> Flow | None:
        name = self.graph.tensor_names.get(node)
        if name is not None:
            tensor = self.graph.tensors[name].detach().cpu()
            return Flow(tuple(tensor.shape), self.labels[name], states.constant(tensor), name)
        if node in self.graph.constants:
            tensor = self.graph.constants[node].detach().cpu()
            return Flow(tuple(tensor.shape), (None,) * tensor.dim(), states.constant(tensor))
        return unknown_flow(node.meta.get("val"))

    def _call(self, node: Node) -> None:
        name = op_name(node)
        rule = find_rule(node)
        bound = self._bind(node)
        schema = _torch.schema(node.target)
        mutates = schema is not None and any(
            a.alias_info is not None and a.alias_info.is_write for a in schema.arguments
        )
        if not _makes_tensors(node) and not mutates:
            self.flows[node] = None  # an assertion or a size: nothing flows out of it
            return
        flows = rule(self, node, bound) if rule is not None else None
        if flows is None:
            flows = self._unknown(node)
        self.flows[node] = self.made[node] = flows
        self._follow_aliases(node, name, mutates, rule is not None)

    def _bind(self, node: Node) -> dict[str, Any]:
        """The arguments by name, flows in the place of nodes, defaults filled in."""
        schema = _torch.schema(node.target)
        if schema is None:
            return {str(i): self._to_flow(a) for i, a in enumerate(node.args)}
        bound: dict[str, Any] = {}
        for index, argument in enumerate(schema.arguments):
            if index < len(node.args) and not argument.kwarg_only:
                bound[argument.name] = self._to_flow(node.args[index])
            elif argument.name in node.kwargs:
                bound[argument.name] = self._to_flow(node.kwargs[argument.name])
            elif argument.has_default_value():
                bound[argument.name] = argument.default_value
        return bound

    def _to_flow(self, argument: Any) -> Any:
        return map_arg(argument, self.flows.get)

    def _input_flows(self, arguments: Any) -> list[Flow]:
        found = (self.flows.get(a) for a in _nodes(arguments))
        return [
            f
            for flow in found
            for f in (flow if isinstance(flow, list | tuple) else [flow])
            if isinstance(f, Flow)
        ]

    def _unknown(self, node: Node) -> Any:
        """An op without a rule: it may do anything with any index of its inputs."""
        inputs = self._input_flows([node.args, node.kwargs])
        touched = [f for f in inputs if any(v is not None for v in f.labels)]
        if touched:
            self.unknown[where(node)] = self.unknown.get(where(node), 0) + 1
            for flow in touched:
                for labels in flow.labels:
                    self.sets.claim(labels)
                self.pin(flow, f"read by {where(node)}, an op that is not known here")
        return _torch.tree_map(unknown_flow, node.meta.get("val"))

    def _follow_aliases(self, node: Node, name: str, mutates: bool, known: bool) -> None:
        """Views share memory: a write to one of them changes what is known of the others."""
        sources = node.all_input_nodes
        if not sources:
            return
        schema = _torch.schema(node.target)
        returns_alias = (
            schema is None
            or name in ("dropout", "feature_dropout")
            or any(r.alias_info is not None for r in schema.returns)
        )
        root = self._roots.get(sources[0], sources[0])
        if returns_alias:
            self._roots[node] = root
            self._shares[root].append(node)
        if not mutates:
            return
        self._writes[root].append(self.positions[node])
        written = node.args[0] if node.args and isinstance(node.args[0], Node) else sources[0]
        for other in [root, *self._shares[root]]:
            later = any(self.positions[u] > self.positions[node] for u in other.users)
            flow = self.flows.get(other)
            if other in (node, written) or not later or not isinstance(flow, Flow):
                continue
            self.flows[other] = Flow(flow.shape, flow.labels, states.live(flow.rank))
        result = self.flows[node]
        if known and isinstance(result, Flow):
            self.flows[written] = result
        else:
            flow = self.flows.get(written)
            if isinstance(flow, Flow):
                self.flows[written] = Flow(flow.shape, flow.labels, states.live(flow.rank))


def unknown_flow(value: Any) -> Any:
    """Live, and no channel in it: a model's input, or the result of an op that is not known."""
    if not isinstance(value, Tensor):
        return None
    return Flow(tuple(value.shape), (None,) * value.dim(), states.live(value.dim()))


def meta_shape(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


_CHANNEL_WISE = {
    "batch_norm",
    "instance_norm",
    "dropout",
    "feature_dropout",
    "to",
    "contiguous",
    "hardswish",
    "prelu",
}


def keeps_channels_apart(node: Node) -> bool:
    """Index i of the result, along any dimension the op does not shrink, is made from the indices i of its
    inputs."""
    name = op_name(node).removesuffix("_")
    return torch.Tag.pointwise in getattr(node.target, "tags", []) or name in _CHANNEL_WISE


def _makes_tensors(node: Node) -> bool:
    return any(isinstance(v, torch.Tensor) for v in _torch.tree_leaves(node.meta.get("val")))


def _nodes(arguments: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(arguments, found.append)
    return found
