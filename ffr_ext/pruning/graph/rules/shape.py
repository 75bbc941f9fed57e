"""Ops that move values and change none: views, permutations, concatenations, slices, padding."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import states
from ..analysis import Analysis, Flow, Labels, meta_shape
from ..registry import rule
from ..states import State, fill_dims
from ..trace import module_path, where
from .pointwise import combined_labels
from .split import narrowed

# ---------------------------------------------------------------------------------------------------
# Views
# ---------------------------------------------------------------------------------------------------


def blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of dimensions that a reshape keeps apart: [B, C, H, W] to [B, C*H*W] is (0 -> 0),
    (1, 2, 3 -> 1). Dimensions of size 1 are in no group."""
    left = [d for d, s in enumerate(before) if s != 1]
    right = [d for d, s in enumerate(after) if s != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while left or right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        products = [before[ins[0]], after[outs[0]]]
        while products[0] != products[1]:
            if products[0] < products[1]:
                ins.append(left.pop(0))
                products[0] *= before[ins[-1]]
            else:
                outs.append(right.pop(0))
                products[1] *= after[outs[-1]]
        groups.append((ins, outs))
    return groups


@rule(
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as", "squeeze", "unsqueeze"
)
def _reshape(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    flow: Flow = bound["self"]
    shape = meta_shape(node)
    if 0 in flow.shape:
        return None
    groups = blocks(flow.shape, shape)
    labels: list[Labels] = [None] * len(shape)
    for ins, outs in groups:
        for dim, moved in zip(
            outs, _reshape_labels(analysis, node, flow, ins, [shape[d] for d in outs]), strict=True
        ):
            labels[dim] = moved
    state = State(
        _reshape_compressed(flow.state.value, flow.shape, shape, groups),
        _reshape_compressed(flow.state.live, flow.shape, shape, groups),
    )
    return Flow(shape, tuple(labels), state)


def _reshape_labels(
    analysis: Analysis, node: Node, flow: Flow, ins: list[int], sizes: list[int]
) -> list[Labels]:
    labelled = [d for d in ins if flow.labels[d] is not None]
    if not labelled:
        return [None] * len(sizes)
    if len(labelled) > 1:
        analysis.pin(flow, f"several dimensions of channels are merged by {where(node)}", labelled)
        return [None] * len(sizes)
    (dim,) = labelled
    vector = flow.labels[dim]
    assert vector is not None
    within = (
        states.along(vector, ins.index(dim), len(ins)).expand([flow.shape[d] for d in ins]).reshape(sizes)
    )
    for k in range(
        len(sizes)
    ):  # the labels lie along one of the new dimensions if they are the same all over the others
        along = within
        for other in range(len(sizes)):
            if other != k:
                along = along.narrow(other, 0, 1)
        if torch.equal(along.expand(sizes), within):
            return [along.flatten() if j == k else None for j in range(len(sizes))]
    analysis.sets.claim(vector)
    if len(ins) > 1 or len(sizes) < 2:
        analysis.sets.pin(vector, f"split over several dimensions by {where(node)}")
        return [None] * len(sizes)
    return _divided(analysis, node, within)


def _divided(analysis: Analysis, node: Node, within: Tensor) -> list[Labels]:
    """Channels divided into heads of several features, or into several tensors of such heads: [.., heads, features].
    A head is one channel: it leaves as a whole."""
    heads = within.movedim(-2, 0).flatten(1)
    for other in range(1, heads.shape[1]):
        analysis.sets.unify(heads[:, 0], heads[:, other])
    analysis.divided.append((module_path(node), [heads[:, 0]]))
    return [heads[:, 0] if d == within.dim() - 2 else None for d in range(within.dim())]


def _reshape_compressed(
    tensor: Tensor, before: Sequence[int], after: Sequence[int], groups: list[tuple[list[int], list[int]]]
) -> Tensor:
    target = [1] * len(after)
    for ins, outs in groups:
        if any(tensor.shape[d] != 1 for d in ins):
            tensor = fill_dims(tensor, before, ins)
            for d in outs:
                target[d] = after[d]
    return tensor.reshape(target)


@rule("permute", "transpose", "t", "numpy_T", "swapaxes", "swapdims")
def _permute(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    flow: Flow = bound["self"]
    order = list(range(flow.rank))
    if "dims" in bound:
        order = [d % flow.rank for d in bound["dims"]]
    elif "dim0" in bound or "axis0" in bound:
        a, b = (bound[k] if k in bound else bound[j] for k, j in (("dim0", "axis0"), ("dim1", "axis1")))
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return Flow(
        tuple(flow.shape[d] for d in order),
        tuple(flow.labels[d] for d in order),
        State(flow.state.value.permute(order), flow.state.live.permute(order)),
    )


@rule("expand", "expand_as")
def _expand(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    flow: Flow = bound["self"]
    shape = meta_shape(node)
    new = len(shape) - flow.rank
    kept = [v if flow.shape[d] == shape[d + new] else None for d, v in enumerate(flow.labels)]
    labels: list[Labels] = [*(None for _ in range(new)), *kept]
    if isinstance(like := bound.get("other"), Flow):  # as large as another tensor, also when that is cut
        spread = [d for d, size in enumerate(shape) if d < new or flow.shape[d - new] != size]
        labels = [like.labels[d] if d in spread else v for d, v in enumerate(labels)]
    leading = (1,) * new
    return Flow(
        shape,
        tuple(labels),
        State(
            flow.state.value.reshape(leading + flow.state.value.shape),
            flow.state.live.reshape(leading + flow.state.live.shape),
        ),
    )


@rule("repeat")
def _repeat(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    flow: Flow = bound["self"]
    times, shape = bound["repeats"], meta_shape(node)
    new = len(shape) - flow.rank
    labels: list[Labels] = [None] * new
    for dim in range(flow.rank):
        vector = flow.labels[dim]
        labels.append(None if vector is None else vector.repeat(times[dim + new]))

    def tile(tensor: Tensor) -> Tensor:
        tensor = tensor.reshape((1,) * new + tuple(tensor.shape))
        return tensor.repeat([t if tensor.shape[d] > 1 else 1 for d, t in enumerate(times)])

    return Flow(shape, tuple(labels), State(tile(flow.state.value), tile(flow.state.live)))


@rule("roll", "flip")
def _move_along(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    flow: Flow = bound["self"]
    dims = [d % flow.rank for d in bound["dims"]]
    if not dims or any(flow.state.value.shape[d] > 1 or flow.state.live.shape[d] > 1 for d in dims):
        return None
    analysis.pin(flow, f"moved by {where(node)}", dims)
    return Flow(flow.shape, flow.labels, flow.state)


# ---------------------------------------------------------------------------------------------------
# Putting together and taking apart
# ---------------------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def _cat(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    shape = meta_shape(node)
    # A cache begins with an empty tensor of one dimension, which adds nothing.
    flows = [f for f in bound["tensors"] if not (isinstance(f, Flow) and f.shape == (0,) != shape)]
    if not flows or not all(isinstance(f, Flow) and f.rank == len(shape) for f in flows):
        return None
    return _join(analysis, node, flows, bound["dim"] % len(shape), shape)


@rule("stack")
def _stack(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    shape = meta_shape(node)
    dim = bound["dim"] % len(shape)
    flows = []
    for flow in bound["tensors"]:
        labels = (*flow.labels[:dim], None, *flow.labels[dim:])
        state = State(flow.state.value.unsqueeze(dim), flow.state.live.unsqueeze(dim))
        flows.append(Flow((*flow.shape[:dim], 1, *flow.shape[dim:]), labels, state))
    return _join(analysis, node, flows, dim, shape)


def _join(analysis: Analysis, node: Node, flows: list[Flow], dim: int, shape: tuple[int, ...]) -> Flow:
    parts: list[Tensor] = []
    for flow in flows:
        vector = flow.labels[dim]
        parts.append(
            analysis.sets.new_pinned(
                flow.shape[dim], f"joined by {where(node)} from a tensor that has no channels"
            )
            if vector is None
            else vector
        )
    lifted = [
        Flow((*f.shape[:dim], 1, *f.shape[dim + 1 :]), (*f.labels[:dim], None, *f.labels[dim + 1 :]), f.state)
        for f in flows
    ]
    labels = list(combined_labels(analysis, node, lifted, (*shape[:dim], 1, *shape[dim + 1 :])))
    labels[dim] = None if all(f.labels[dim] is None for f in flows) else torch.cat(parts)

    def joined(tensors: list[Tensor]) -> Tensor:
        filled = [fill_dims(t, f.shape, [dim]) for t, f in zip(tensors, flows, strict=True)]
        others = torch.broadcast_shapes(*((*t.shape[:dim], 1, *t.shape[dim + 1 :]) for t in filled))
        return torch.cat([t.expand((*others[:dim], t.shape[dim], *others[dim + 1 :])) for t in filled], dim)

    return Flow(
        shape,
        tuple(labels),
        State(joined([f.state.value for f in flows]), joined([f.state.live for f in flows])),
    )


@rule("slice", "narrow")
def _slice(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    flow: Flow = bound["self"]
    dim = bound["dim"] % flow.rank
    size, step = meta_shape(node)[dim], bound.get("step") or 1
    start = bound.get("start") or 0
    if not isinstance(start, int) or size == 0 or any(isinstance(a, Node) for a in node.args[1:]):
        return None  # a place that depends on values
    start = min(start + flow.shape[dim] if start < 0 else start, flow.shape[dim])
    if size == flow.shape[dim]:
        return Flow(flow.shape, flow.labels, flow.state)
    vector = flow.labels[dim]
    if vector is not None and start < step and size * step == flow.shape[dim]:
        phases = vector.reshape(size, step)  # x[..., ::2]: the channels of a step leave together
        for phase in range(1, step):
            analysis.sets.unify(phases[:, 0], phases[:, phase])
    else:
        analysis.pin(flow, f"sliced by {where(node)}", [dim])
    return narrowed(flow, dim, start, size, step)


@rule("select")
def _select(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    flow: Flow = bound["self"]
    dim = bound["dim"] % flow.rank
    analysis.pin(flow, f"one index is taken by {where(node)}", [dim])
    return _without_dim(narrowed(flow, dim, bound["index"] % flow.shape[dim], 1), dim)


def _without_dim(flow: Flow, dim: int) -> Flow:
    return Flow(
        (*flow.shape[:dim], *flow.shape[dim + 1 :]),
        (*flow.labels[:dim], *flow.labels[dim + 1 :]),
        State(flow.state.value.select(dim, 0), flow.state.live.select(dim, 0)),
    )


@rule("unbind")
def _unbind(analysis: Analysis, node: Node, bound: dict[str, Any]) -> list[Flow]:
    flow: Flow = bound["self"]
    dim = bound["dim"] % flow.rank
    analysis.pin(flow, f"taken apart by {where(node)}", [dim])
    return [_without_dim(narrowed(flow, dim, i, 1), dim) for i in range(flow.shape[dim])]


@rule("getitem")
def _getitem(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    if node.target is not operator.getitem or not isinstance(bound["0"], list | tuple):
        return None
    flow = bound["0"][bound["1"]]
    return flow if isinstance(flow, Flow) else None


@rule(
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def _pad(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    flow: Flow = bound["self"] if "self" in bound else bound["input"]
    amounts: list[int] = bound["pad"] if "pad" in bound else bound["padding"]
    shape = meta_shape(node)
    constant = bound.get("mode", "constant") == "constant" and "tion_pad" not in str(node.target)
    fill = float(bound.get("value") or 0.0)
    labels, value, live = list(flow.labels), flow.state.value.double(), flow.state.live
    for i in range(len(amounts) // 2):
        dim, before, after = flow.rank - 1 - i, amounts[2 * i], amounts[2 * i + 1]
        if before == after == 0:
            continue
        vector = flow.labels[dim]
        if before < 0 or after < 0 or (vector is not None and not constant):
            return None
        if vector is None:
            if constant:  # a channel whose constant is the padding stays a constant; another one has a border
                value, live = _bordered(analysis, value, live, dim, fill)
            else:
                value, live = _bordered(analysis, value, live, dim, None)
            continue
        reason = f"padded by {where(node)}"
        sides = [analysis.sets.new_pinned(n, reason) for n in (before, after)]
        labels[dim] = torch.cat([sides[0], vector, sides[1]])
        value, live = fill_dims(value, flow.shape, [dim]), fill_dims(live, flow.shape, [dim])
        amount = [0, 0] * i + [before, after]
        value = torch.nn.functional.pad(value, amount, value=fill)
        live = torch.nn.functional.pad(live.byte(), amount, value=0).bool()
    padded = [flow.rank - 1 - i for i in range(len(amounts) // 2) if amounts[2 * i] or amounts[2 * i + 1]]
    in_space = constant and fill == 0 and all(d >= 2 and flow.labels[d] is None for d in padded)
    inner = (flow.inner or flow.state) if in_space else None
    return Flow(shape, tuple(labels), states.make(value, live), inner=inner)


def _bordered(
    analysis: Analysis, value: Tensor, live: Tensor, dim: int, fill: float | None
) -> tuple[Tensor, Tensor]:
    changes = value.amin(dim, keepdim=True) != value.amax(dim, keepdim=True)
    value = value.narrow(dim, value.shape[dim] // 2, 1)
    live = live.any(dim, keepdim=True)
    if analysis.strict:
        live = live | changes
        if fill is not None:
            live = live | (value != fill)
    return value, live
