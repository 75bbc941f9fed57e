"""Residual branches that are dead as a whole: the module around one is an identity, or gives zeros.

A block x + branch(x) whose branch is 0 computes x, and so does relu(x + 0) for an x that is never negative.
Such a block becomes `nn.Identity`. A module that gives zeros of its input's shape becomes `nn.Threshold(inf,
0)`, which does the same without a parameter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node

from ..filters import filter_dim
from .analysis import Analysis, Flow
from .channels import ResolvedSets
from .states import on_cpu
from .trace import module_paths, op_name

IDENTITY, ZEROS = "Identity", "Threshold"

_NEVER_NEGATIVE = {"relu", "relu6", "sigmoid", "softmax", "hardsigmoid", "abs", "square", "exp", "softplus"}
_KEEPS_SIGN = {
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "mean",
    "sum",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "add",
    "mul",
    "cat",
    "view",
    "reshape",
    "flatten",
    "permute",
    "transpose",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
}
_SAME = {"to", "_to_copy", "contiguous", "clone", "detach", "alias", "dropout", "feature_dropout"}


def replacement(kind: str) -> nn.Module:
    """The standard module that a dead module becomes."""
    return nn.Identity() if kind == IDENTITY else nn.Threshold(float("inf"), 0.0)


@on_cpu
def dead_branches(analysis: Analysis) -> dict[str, str]:
    """Path of each outermost module that can be replaced -> what by."""
    same_as = _equalities(analysis)
    sets = analysis.sets.resolve()
    inside: dict[str, set[Node]] = {}
    for node in analysis.graph.nodes:
        if node.op == "call_function":
            for path in module_paths(node):
                inside.setdefault(path, set()).add(node)
    found: dict[str, str] = {}
    for path in sorted(inside, key=lambda p: p.count(".")):
        if path and not any(path.startswith(f"{outer}.") for outer in found):
            kind = _replaceable(analysis, path, inside, same_as, sets)
            if kind is not None:
                found[path] = kind
    return found


def _replaceable(
    analysis: Analysis, path: str, inside: dict[str, set[Node]], same_as: dict[Node, Node], sets: ResolvedSets
) -> str | None:
    modules = analysis.graph.modules
    module = modules.get(path)
    called_once = "@" not in path and f"{path}@1" not in inside
    if module is None or not called_once or not any(filter_dim(m) is not None for m in module.modules()):
        return None
    if sum(m is module for m in modules.values()) > 1:
        return None
    nodes = inside[path]
    inputs = {
        a for n in nodes for a in _arguments(n) if a not in nodes and a not in analysis.graph.tensor_names
    }
    outputs = {n for n in nodes if any(u not in nodes for u in n.users)}
    if len(inputs) != 1 or len(outputs) != 1:
        return None
    (source,), (result,) = inputs, outputs
    before, after = analysis.made.get(source), analysis.made.get(result)
    if not isinstance(before, Flow) or not isinstance(after, Flow) or before.shape != after.shape:
        return None
    if source.meta["val"].dtype != result.meta["val"].dtype:
        return None
    if same_as.get(result, result) is same_as.get(source, source):
        return IDENTITY
    if any(op_name(user).removesuffix("_") not in ("add", "sub") for user in result.users):
        return None  # no residual branch: a gate, say, whose zeros the next op makes something else of
    # A grouped convolution that is cut to one channel per group couples its channels only then: leave it
    # alone, so that a second compaction finds no more than the first.
    if any(getattr(m, "groups", 1) != 1 for m in module.modules()):
        return None
    return ZEROS if _coupled(before, after, sets) and bool(after.state.zero().all()) else None


def _coupled(before: Flow, after: Flow, sets: ResolvedSets) -> bool:
    """Of one shape because their channels are the same, as in x + branch(x), or all stay; not by chance,
    which cutting could bring about as well."""
    labelled = 0
    for a, b in zip(before.labels, after.labels, strict=True):
        if b is None:
            if a is not None:
                return False
            continue
        labelled += 1
        same = (
            sets.pinned[sets.channel_of[b]].all()
            if a is None
            else sets.channel_of[a].equal(sets.channel_of[b])
        )
        if not bool(same):
            return False
    return labelled > 0


def _arguments(node: Node) -> list[Node]:
    return node.all_input_nodes


def _equalities(analysis: Analysis) -> dict[Node, Node]:
    """Node -> the earliest node that has the same values."""
    same: dict[Node, Node] = {}
    positive: set[Node] = set()
    for node in analysis.graph.nodes:
        if node.op != "call_function" or not isinstance(analysis.made.get(node), Flow):
            continue
        name = op_name(node).removesuffix("_")
        arguments = _arguments(node)
        low = node.args[1] if name in ("hardtanh", "clamp", "clamp_min") and len(node.args) > 1 else None
        if (
            name in _NEVER_NEGATIVE
            or (isinstance(low, int | float) and low >= 0)
            or (
                name in _KEEPS_SIGN
                and all(
                    (same.get(a, a) in positive or a in positive) and analysis.unchanged(a, node)
                    for a in arguments
                )
            )
        ):
            positive.add(node)
        equal = _equal_argument(analysis, node, name, positive, same)
        if equal is not None and analysis.unchanged(same.get(equal, equal)):
            same[node] = same.get(equal, equal)
            if same[node] in positive:
                positive.add(node)
    return same


def _equal_argument(
    analysis: Analysis, node: Node, name: str, positive: set[Node], same: dict[Node, Node]
) -> Node | None:
    flow = analysis.made[node]
    arguments = [a for a in node.args if isinstance(a, Node)]
    if not arguments or not all(isinstance(analysis.made.get(a), Flow) for a in arguments):
        return None
    if not all(analysis.unchanged(a, node) for a in arguments):
        return None

    def fits(a: Node) -> bool:
        val: Any = a.meta.get("val")
        return (
            isinstance(val, torch.Tensor)
            and tuple(val.shape) == flow.shape
            and val.dtype == node.meta["val"].dtype
        )

    first = arguments[0]
    if name in _SAME or (name == "relu" and (first in positive or same.get(first) in positive)):
        return first if fits(first) else None
    if name in ("add", "sub") and len(arguments) == 2:
        second = arguments[1]
        if _is_zero(analysis, second) and fits(first):
            return first
        if name == "add" and node.kwargs.get("alpha", 1) == 1 and _is_zero(analysis, first) and fits(second):
            return second
    return None


def _is_zero(analysis: Analysis, node: Node) -> bool:
    flow = analysis.made[node]
    return isinstance(flow, Flow) and bool(flow.state.zero().all())
