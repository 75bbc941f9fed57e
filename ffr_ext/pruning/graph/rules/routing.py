"""Rows that are taken and put back by their numbers, and ops that choose: how mixtures of experts send tokens. Rows
stay, whichever they are; channels go along."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from ..analysis import Analysis, Flow, Labels, meta_shape
from ..registry import rule
from ..states import State, live, make
from ..trace import where
from .pointwise import combined_labels, fold, pointwise


class _Rows(NamedTuple):
    """Dimensions first.. of a tensor that indices speak of, up to `after`, and how many they become where taken."""

    first: int
    after: int
    taken: int


@rule("index")
def _index(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    """x[:, index], x[mask], x[i, j]: indices of dimensions that lie side by side."""
    flows = [bound["self"], *(i for i in bound["indices"] if i is not None)]
    if all(f.state.all_constant() for f in flows):
        return fold(analysis, node, bound)
    rows = _rows(node.args[1])
    return None if rows is None else _take(analysis, node, bound["self"], rows)


@rule("index_select")
def _index_select(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    dim = bound["dim"] % bound["self"].rank
    return _take(analysis, node, bound["self"], _Rows(dim, dim + 1, 1))


def _take(analysis: Analysis, node: Node, flow: Flow, rows: _Rows) -> Flow:
    """Constant where all rows are, and are the same: that of a table too, as the biases of experts."""
    first, after, taken = rows
    _stay(analysis, node, flow, range(first, after))
    none: list[Labels] = [None] * taken
    value, is_live = _same_for_all(flow.state, [*range(first, after)])
    value, is_live = (t.reshape([*t.shape[:first], *[1] * taken, *t.shape[after:]]) for t in (value, is_live))
    return Flow(meta_shape(node), (*flow.labels[:first], *none, *flow.labels[after:]), make(value, is_live))


def _same_for_all(state: State, dims: list[int]) -> tuple[Tensor, Tensor]:
    """Value and live with size 1 in `dims`: constant where all along them are, and are the same."""
    if not dims:
        return state.value.double(), state.live
    least, most = (f(state.value.double(), dims, keepdim=True) for f in (torch.amin, torch.amax))
    return least, state.live.any(dim=dims, keepdim=True) | (least != most)


@rule("index_add")
def _index_add(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    dim = bound["dim"] % bound["self"].rank
    return _put(analysis, node, bound["self"], bound["source"], _Rows(dim, dim + 1, 1), adds=True)


@rule("index_copy")
def _index_copy(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    dim = bound["dim"] % bound["self"].rank
    return _put(analysis, node, bound["self"], bound["source"], _Rows(dim, dim + 1, 1), adds=False)


@rule("index_put")
def _index_put(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    """x[mask] = values, x[i, j] += values."""
    rows = _rows(node.args[1])
    if rows is None:
        return None
    return _put(analysis, node, bound["self"], bound["values"], rows, adds=bool(bound["accumulate"]))


def _put(analysis: Analysis, node: Node, x: Flow, values: Flow, rows: _Rows, adds: bool) -> Flow | None:
    """x with values added to some of its rows, or in their place: constant where neither changes anything."""
    first, after, taken = rows
    missing = first + taken + x.rank - after - values.rank
    if missing < 0:
        return None
    shape = (*[1] * missing, *values.shape)
    given: tuple[Labels, ...] = (*[None] * missing, *values.labels)
    state = State(*(t.reshape((*[1] * missing, *t.shape)) for t in _parts(values.state)))
    spare = range(first, first + taken)
    for dim, labels in enumerate(given):
        if dim in spare:
            analysis.sets.claim(labels)
            analysis.sets.pin(labels, f"indexed by {where(node)}")
    _stay(analysis, node, x, range(first, after))

    # What leaves a row as it was.
    expected = torch.zeros((), dtype=torch.float64) if adds else x.state.value.double()
    value, is_live = _same_for_all(state, [*spare])
    if not adds and any(t.shape[d] > 1 for t in _parts(x.state) for d in range(first, after)):
        is_live = torch.ones_like(is_live)
    ones = [1] * (after - first)
    value, is_live = (
        t.reshape([*t.shape[:first], *ones, *t.shape[first + taken :]]) for t in (value, is_live)
    )
    none: list[Labels] = [None] * (after - first)

    def without_rows(size: tuple[int, ...], labels: tuple[Labels, ...], end: int) -> Flow:
        return Flow(
            (*size[:first], *ones, *size[end:]), (*labels[:first], *none, *labels[end:]), live(x.rank)
        )

    sides = [without_rows(x.shape, x.labels, after), without_rows(shape, given, first + taken)]
    combined = combined_labels(analysis, node, sides, sides[0].shape)
    unchanged = (value == expected) & ~is_live
    result = make(x.state.value.double(), x.state.live | ~unchanged)
    return Flow(x.shape, (*combined[:first], *x.labels[first:after], *combined[after:]), result)


def _stay(analysis: Analysis, node: Node, flow: Flow, dims: range) -> None:
    for dim in dims:
        analysis.sets.claim(flow.labels[dim])
    analysis.pin(flow, f"indexed by {where(node)}", dims)


def _rows(indices: Any) -> _Rows | None:
    """What a list of indices speaks of, a mask of as many dimensions as it has; None where they lie apart."""
    dims: list[int] = []
    at = most = 0
    for index in indices:
        value: Tensor | None = None if index is None else index.meta["val"]
        mask = value is not None and value.dtype in (torch.bool, torch.uint8)
        width = value.dim() if value is not None and mask else 1
        if value is not None:
            dims += range(at, at + width)
            most = max(most, 1 if mask else int(value.dim()))
        at += width
    side_by_side = bool(dims) and dims[-1] - dims[0] + 1 == len(dims)
    return _Rows(dims[0], dims[-1] + 1, most) if side_by_side else None


def _parts(state: State) -> tuple[Tensor, Tensor]:
    return state.value, state.live


@rule("topk", "sort", "argsort", "argmax", "argmin", "max", "min")
def _chosen(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Any:
    """A choice among the entries along one dimension, which all stay."""
    x: Flow = bound["self"]
    if "other" in bound:  # the larger of two tensors
        return pointwise(analysis, node, bound)
    if not isinstance(bound.get("dim"), int) or not x.rank or x.state.all_constant():
        return fold(analysis, node, bound)
    dim = bound["dim"] % x.rank
    analysis.sets.claim(x.labels[dim])
    analysis.pin(x, f"chosen from by {where(node)}", [dim])

    def result(shape: tuple[int, ...]) -> Flow:
        kept: list[Labels] = [None] if len(shape) == x.rank else []
        return Flow(shape, (*x.labels[:dim], *kept, *x.labels[dim + 1 :]), live(len(shape)))

    value = node.meta["val"]
    if isinstance(value, Tensor):
        return result(tuple(value.shape))
    return [result(tuple(v.shape)) for v in value]


@rule("one_of")
def _one_of(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    """Each row is that of one of the experts: constant where it is the same constant for all."""
    flows: list[Flow] = list(bound.values())
    shape = meta_shape(node)
    first = flows[0].state
    is_live = torch.zeros((1,) * len(shape), dtype=torch.bool)
    for flow in flows:
        is_live = is_live | flow.state.live | (flow.state.value.double() != first.value.double())
    value = first.value.double().expand(torch.broadcast_shapes(first.value.shape, is_live.shape))
    return Flow(shape, combined_labels(analysis, node, flows, shape), make(value, is_live))
