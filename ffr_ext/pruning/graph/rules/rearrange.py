"""Ops that move channels into space and back: pixel shuffle and unshuffle."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from .. import states
from ..analysis import Analysis, Flow, Labels, meta_shape
from ..registry import rule
from .norms import spatially_uniform


@rule("pixel_shuffle")
def _pixel_shuffle(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    """[.., C r^2, H, W] to [.., C, r H, r W]: the r^2 channels of one result are one channel, and leave together."""
    x, square = bound["self"], bound["upscale_factor"] ** 2
    dim, shape = x.rank - 3, meta_shape(node)
    if any(labels is not None for labels in x.labels[-2:]):
        return None
    labels: Labels = x.labels[dim]
    if labels is not None:
        parts = labels.view(-1, square)
        for other in range(square):
            analysis.sets.unify(parts[:, 0], parts[:, other])
        labels = parts[:, 0]
        if shape[dim] == 1:
            analysis.sets.pin(labels, "the only channel")
            labels = None
    state = spatially_uniform(analysis, x.state, x.rank - 2)
    value, live = (
        t.unflatten(dim, (-1, square)) if t.shape[dim] > 1 else t.unsqueeze(dim + 1)
        for t in (state.value, state.live)
    )
    if analysis.strict:  # different constants make a pattern
        live = live | (value.amin(dim + 1, keepdim=True) != value.amax(dim + 1, keepdim=True))
    made = states.make(value.select(dim + 1, 0), live.any(dim + 1))
    return Flow(shape, (*x.labels[:dim], labels, None, None), made)


@rule("pixel_unshuffle")
def _pixel_unshuffle(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    """[.., C, r H, r W] to [.., C r^2, H, W]: r^2 channels come from one, and are all there or none."""
    x, square = bound["self"], bound["downscale_factor"] ** 2
    dim = x.rank - 3
    if any(labels is not None for labels in x.labels[-2:]):
        return None
    labels: Labels = x.labels[dim]
    if labels is None and x.shape[dim] == 1:
        return None
    if labels is not None:
        analysis.sets.claim(labels)
        labels = labels.repeat_interleave(square)
    state = spatially_uniform(analysis, x.state, x.rank - 2)
    value, live = (
        t.repeat_interleave(square, dim) if t.shape[dim] > 1 else t for t in (state.value, state.live)
    )
    return Flow(meta_shape(node), (*x.labels[:dim], labels, None, None), states.make(value, live))
