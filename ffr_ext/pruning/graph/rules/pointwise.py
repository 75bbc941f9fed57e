"""The rules that hold for whole families of ops: pointwise ones, and those whose inputs are all constant."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from ...._torch import overload_name, schema
from .. import states
from ..analysis import MAX_FOLDED, Analysis, Flow, meta_shape
from ..registry import FOLD, POINTWISE, rule
from ..states import State
from ..trace import op_name, out_of_place_name, where


@rule(POINTWISE)
def pointwise(analysis: Analysis, node: Node, _bound: dict[str, Any]) -> Flow | None:
    """Every result element is made from the elements at its own place: labels go through, the state is the op
    of states."""
    if not isinstance(node.meta.get("val"), Tensor):
        return None
    shape = meta_shape(node)
    flows = [analysis.flows.get(a) for a in node.all_input_nodes]
    operands = [f for f in flows if isinstance(f, Flow)]
    if len(operands) != len(flows):
        return None
    labels = combined_labels(analysis, node, operands, shape)
    return Flow(shape, labels, _pointwise_state(analysis, node, operands, len(shape)))


@rule("where")
def _where(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    """With a number in one of the places torch does not call it pointwise; with the condition alone it is none. Where
    both are the same constant, so is the result, whatever the condition."""
    if len(node.args) != 3:
        return None
    flow = pointwise(analysis, node, bound)
    if flow is None or flow.state.all_constant():
        return flow
    live, values = torch.zeros((1,) * flow.rank, dtype=torch.bool), []
    for given in (bound["self"], bound["other"]):
        state = given.state if isinstance(given, Flow) else _constant(0, given)
        live = live | state.live
        values.append(state.value.double())
    live = flow.state.live & (live | (values[0] != values[1]))
    value = torch.where(flow.state.live, values[0], flow.state.value.double())
    return Flow(flow.shape, flow.labels, states.make(value, live))


def combined_labels(
    analysis: Analysis, node: Node, operands: list[Flow], shape: tuple[int, ...]
) -> tuple[Tensor | None, ...]:
    """The labels of operands that are combined index by index, with broadcasting."""
    reason = f"combined by {where(node)} with a tensor that has no channels there"
    labels: list[Tensor | None] = []
    for dim in range(-len(shape), 0):
        present = [
            f.labels[dim]
            for f in operands
            if f.rank >= -dim and f.shape[dim] == shape[dim] and shape[dim] > 1
        ]
        result = present[0] if present else None
        analysis.sets.claim(result)
        for other in present[1:]:
            result = analysis.unify(result, other, reason)
        labels.append(result)
    return tuple(labels)


def _pointwise_state(analysis: Analysis, node: Node, operands: list[Flow], rank: int) -> State:
    live = torch.zeros((1,) * rank, dtype=torch.bool)
    for flow in operands:
        live = live | flow.state.live
    name = op_name(node).removesuffix("_")
    zero = torch.zeros_like(live)
    if name == "mul" and len(operands) == 2:  # 0 times anything finite
        zero = operands[0].state.zero() | operands[1].state.zero()
    elif name == "div" and len(operands) == 2:  # 0 divided by what the input decides, as a norm
        zero = operands[0].state.zero() & operands[1].state.live
    live = live & ~zero
    if bool(live.all()):
        return states.live(rank)
    value = _evaluate(node, lambda a: analysis.flows[a].state.value)
    if value is None:
        return states.live(rank)
    return states.make(torch.where(zero, torch.zeros((), dtype=value.dtype), value), live)


def _evaluate(node: Node, value_of: Callable[[Node], Tensor]) -> Tensor | None:
    """The op, out of place, on other tensors; None where it cannot take them."""
    args, kwargs = map_arg(node.args, value_of), dict(map_arg(node.kwargs, value_of))
    for key in ("device", "layout", "pin_memory", "memory_format"):
        kwargs.pop(key, None)
    target: Any = node.target
    if (name := out_of_place_name(node)) != op_name(node):
        packet = getattr(torch.ops.aten, name, None)
        target = getattr(packet, overload_name(target), None)
    if target is None:
        return None
    # States have other dtypes and sizes than the tensors they speak of, and not every op takes every
    # combination.
    with contextlib.suppress(Exception):
        result = target(*args, **kwargs)
        return result if isinstance(result, Tensor) else None
    return None


@rule(FOLD)
def fold(analysis: Analysis, node: Node, _bound: dict[str, Any]) -> Flow | None:
    """An op without a rule whose inputs are all constant (or that has none, like arange): compute it."""
    value = node.meta.get("val")
    flows = [analysis.flows.get(a) for a in node.all_input_nodes]
    if not isinstance(value, Tensor) or schema(node.target) is None or value.numel() > MAX_FOLDED:
        return None
    if not all(isinstance(f, Flow) and f.state.all_constant() for f in flows):
        return None
    result = _evaluate(node, lambda a: analysis.flows[a].state.value.expand(analysis.flows[a].shape))
    if result is None or tuple(result.shape) != tuple(value.shape):
        return None
    for flow in flows:
        if isinstance(flow, Flow):
            for labels in flow.labels:
                analysis.sets.claim(labels)
            analysis.pin(flow, f"read by {where(node)}")
    return Flow(tuple(value.shape), (None,) * value.dim(), states.constant(result))


@rule("zeros_like", "ones_like", "full_like")
def _filled_like(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    flow = bound["self"]
    fill = {"zeros_like": 0.0, "ones_like": 1.0}.get(op_name(node), bound.get("fill_value"))
    return Flow(flow.shape, flow.labels, _constant(flow.rank, fill or 0.0))


@rule("new_zeros", "new_ones", "new_full")
def _filled(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    shape = meta_shape(node)
    fill = {"new_zeros": 0.0, "new_ones": 1.0}.get(op_name(node), bound.get("fill_value"))
    return Flow(
        shape,
        (None,) * len(shape),
        _constant(len(shape), fill or 0.0),
    )


@rule("to", "_to_copy", "type_as", "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "positive")
def _same_values(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    flow = bound["self"]
    dtype = node.meta["val"].dtype
    value = flow.state.value
    if dtype.is_floating_point != value.dtype.is_floating_point or dtype == torch.bool:
        value = value.to(dtype)
    return Flow(flow.shape, flow.labels, State(value, flow.state.live))


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _dropout(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    flow: Flow = bound["input"] if "input" in bound else bound["self"]
    return None if bound["train"] else Flow(flow.shape, flow.labels, flow.state)


@rule("threshold")
def _threshold(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    if bound["threshold"] != float("inf"):
        return pointwise(analysis, node, bound)
    flow: Flow = bound["self"]  # what a dead branch was replaced by
    return Flow(flow.shape, flow.labels, _constant(flow.rank, bound["value"]))


@rule("prelu")
def _prelu(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    flow, slope = bound["self"], bound["weight"]
    value, live = flow.state.value, flow.state.live
    labels = list(flow.labels)
    factor = slope.state.value.double()
    if slope.shape[0] > 1:
        reason = f"combined by {where(node)} with a tensor that has no channels there"
        labels[1] = analysis.unify(flow.labels[1], slope.labels[0], reason)
        factor = states.along(factor, 1, flow.rank)
    if not slope.state.all_constant():
        return None
    return Flow(
        flow.shape,
        tuple(labels),
        states.make(
            torch.where(value > 0, value, factor * value), live | torch.zeros_like(factor, dtype=torch.bool)
        ),
    )


def _constant(rank: int, value: Any) -> State:
    return states.constant(torch.full((1,) * rank, float(value), dtype=torch.float64))
