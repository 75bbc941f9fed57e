"""Attention: heads are kept apart, and one that nobody reads, or that gives zeros, leaves as a whole. Everything inside
a head stays."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..analysis import Analysis, Flow, Labels, meta_shape
from ..registry import rule
from ..states import make
from ..trace import where
from .pointwise import combined_labels


@rule("scaled_dot_product_attention")
def _attention(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    """[.., heads, steps, features]; with fewer heads of keys and values, each serves a group of queries."""
    shape = meta_shape(node)
    query, key, value, mask = (bound.get(k) for k in ("query", "key", "value", "attn_mask"))
    present = [f for f in (query, key, value, mask) if isinstance(f, Flow)]
    reason = f"attention: {where(node)}"
    rank = len(shape)
    for flow in present:
        analysis.pin(flow, reason, [d for d in range(flow.rank) if rank < 4 or d != flow.rank - 3])
        for labels in flow.labels:
            analysis.sets.claim(labels)
    aligned = [_heads_of(flow, shape) for flow in present]
    heads: tuple[Labels, ...] = (
        combined_labels(analysis, node, aligned, (*shape[:-2], 1, 1)) if rank >= 4 else (None,) * rank
    )
    assert isinstance(value, Flow)
    # What is the same for all steps is a mean of equal values, whatever the weights of the mean.
    state = value.state
    live = state.live.any(-2, keepdim=True) | (
        state.value.amin(-2, keepdim=True) != state.value.amax(-2, keepdim=True)
    )
    constant = state.value.select(-2, 0).unsqueeze(-2).double()
    if mask is not None:  # a step that may look at none is 0, or not a number
        live = live | (constant != 0)
    if rank >= 4 and constant.shape[-3] > 1:
        times = shape[-3] // constant.shape[-3]
        constant, live = (
            constant.repeat_interleave(times, -3),
            live.expand(constant.shape[:-3] + live.shape[-3:]),
        )
        live = live.repeat_interleave(times, -3) if live.shape[-3] > 1 else live
    return Flow(shape, heads, make(constant, live))


def _heads_of(flow: Flow, shape: tuple[int, ...]) -> Flow:
    """The flow with nothing but its heads, as many as the result has."""
    labels: list[Labels] = [*flow.labels[:-2], None, None]
    sizes = [*flow.shape[:-2], 1, 1]
    if len(shape) >= 4 and flow.rank >= 3 and 1 < sizes[-3] < shape[-3]:
        heads = labels[-3]
        labels[-3] = None if heads is None else heads.repeat_interleave(shape[-3] // sizes[-3])
        sizes[-3] = shape[-3]
    return Flow(
        tuple(sizes), tuple(labels), make(torch.zeros((1,) * flow.rank), torch.ones((1,) * flow.rank) > 0)
    )


@rule("repeat_interleave")
def _repeat_interleave(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    """Each index several times in a row, as grouped queries do it with keys and values."""
    x, times, dim = bound["self"], bound.get("repeats"), bound.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return None
    dim %= x.rank
    labels = list(x.labels)
    vector = labels[dim]
    labels[dim] = None if vector is None else vector.repeat_interleave(times)
    value, live = (
        t.repeat_interleave(times, dim) if t.shape[dim] > 1 else t for t in (x.state.value, x.state.live)
    )
    return Flow(meta_shape(node), tuple(labels), make(value, live))
