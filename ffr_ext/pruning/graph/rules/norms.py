"""Normalisations, pooling, interpolation, reductions and softmax."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .. import states
from ..analysis import Analysis, Constraint, Flow, Labels, meta_shape
from ..registry import rule
from ..states import State, along
from ..trace import module_path, op_name, where
from .contractions import summed_over
from .pointwise import fold


def _flat(flow: Flow | None) -> Tensor | None:
    return None if flow is None else flow.state.value.expand(flow.shape).double()


def _with_parameters(analysis: Analysis, node: Node, x: Flow, parameters: list[Flow | None]) -> Labels:
    """Dimension 1 of x together with the per-channel vectors of a normalisation."""
    labels = x.labels[1]
    analysis.sets.claim(labels)
    for flow in parameters:
        if flow is not None and x.shape[1] > 1:
            labels = analysis.unify(
                labels, flow.labels[0], f"normalised by {where(node)} without being channels"
            )
    return labels


@rule("batch_norm", "instance_norm")
def _batch_norm(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    x = bound["input"]
    gamma, beta = bound.get("weight"), bound.get("bias")
    mean, var = bound.get("running_mean"), bound.get("running_var")
    parameters = [gamma, beta, mean, var]
    if not all(p is None or p.state.all_constant() for p in parameters):
        return None
    labels = list(x.labels)
    labels[1] = _with_parameters(analysis, node, x, parameters)
    if labels[1] is not None:
        analysis.sized.append((module_path(node), "num_features", labels[1]))
    of_input = bound.get("training", False) or bound.get("use_input_stats", False) or mean is None
    per_channel = {
        k: along(v, 1, x.rank)
        for k, f in (("gamma", gamma), ("beta", beta), ("mean", mean), ("var", var))
        if (v := _flat(f)) is not None
    }
    state = spatially_uniform(analysis, x.state, 2)
    scale: Tensor = per_channel.get("gamma", torch.ones((1,) * x.rank, dtype=torch.float64))
    shift: Tensor = per_channel.get("beta", torch.zeros((1,) * x.rank, dtype=torch.float64))
    if of_input:  # the statistics of a constant are itself and 0
        if state.value.shape[0] > 1:  # a constant of each sample is none of the batch
            state = states.live(x.rank)
        value = shift + torch.zeros_like(state.value)
    else:
        value = (state.value - per_channel["mean"]) * (
            per_channel["var"] + bound["eps"]
        ).rsqrt() * scale + shift
    value, scale, live = torch.broadcast_tensors(value, scale, state.live)
    live = live & (scale != 0)
    value = torch.where(scale == 0, shift.expand_as(value), value)
    return Flow(x.shape, tuple(labels), states.make(value, live))


@rule("group_norm")
def _group_norm(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    x, groups = bound["input"], bound["num_groups"]
    gamma, beta = bound.get("weight"), bound.get("bias")
    labels = list(x.labels)
    labels[1] = _with_parameters(analysis, node, x, [gamma, beta])
    if labels[1] is not None:
        path = module_path(node)
        analysis.constraints.append(
            Constraint("whole", where(node), list(labels[1].chunk(groups)), module=path)
        )
        analysis.sized.append((path, "num_channels", labels[1]))
    return Flow(x.shape, tuple(labels), _silenced(x, gamma, beta, [1]))


@rule("layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    if not isinstance(node.meta["val"], Tensor):
        return None
    x = bound["input"]
    gamma, beta = bound.get("weight"), bound.get("bias")
    dims = list(range(x.rank - len(bound["normalized_shape"]), x.rank))
    reason = f"normalised together by {where(node)}"
    labels = list(x.labels)
    for i, dim in enumerate(dims):
        analysis.sets.claim(labels[dim])
        analysis.sets.pin(labels[dim], reason)
        for flow in (gamma, beta):
            if flow is not None and flow.labels[i] is not None:
                labels[dim] = analysis.unify(labels[dim], flow.labels[i], reason)
    return Flow(x.shape, tuple(labels), _silenced(x, gamma, beta, dims))


def _silenced(x: Flow, gamma: Flow | None, beta: Flow | None, dims: list[int]) -> State:
    """After a norm over several channels a channel is known only where its gamma is 0: it is beta there."""
    if gamma is None:
        return states.live(x.rank)
    shape = [x.shape[d] if d in dims else 1 for d in range(x.rank)]
    scale = gamma.state.value.expand(gamma.shape).double().reshape(shape)
    shift = (
        torch.zeros_like(scale)
        if beta is None
        else beta.state.value.expand(beta.shape).double().reshape(shape)
    )
    return states.make(shift, scale != 0)


def spatially_uniform(analysis: Analysis, state: State, first: int) -> State:
    """The state with the dimensions from `first` on reduced to one value; where they differ it is live."""
    dims = [d for d in range(first, state.rank) if state.value.shape[d] > 1 or state.live.shape[d] > 1]
    value, live = state.value.double(), state.live
    for dim in dims:
        differs = value.amin(dim, keepdim=True) != value.amax(dim, keepdim=True)
        value = value.narrow(dim, value.shape[dim] // 2, 1)
        live = live.any(dim, keepdim=True)
        if analysis.strict:
            live = live | differs
    return states.make(value, live)


_POOLS = [f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)]
_UPSAMPLES = [
    f"{prefix}upsample_{kind}"
    for prefix in ("", "_")
    for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d", "bicubic2d",
                 "nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa", "bicubic2d_aa")
]  # fmt: skip


@rule(*_POOLS, *_UPSAMPLES)
def _pool(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    if not isinstance(node.meta["val"], Tensor):
        return None
    x: Flow = bound["self"] if "self" in bound else bound["input"]
    name = op_name(node)
    digits = re.search(r"(\d)d", name)
    assert digits is not None
    spatial = int(digits[1])
    first = x.rank - spatial
    if any(labels is not None for labels in x.labels[first:]):
        return None
    state, inner = spatially_uniform(analysis, x.state, first), None
    if name.startswith("avg_pool") and bound.get("count_include_pad", True) and _any(bound["padding"]):
        live = state.live | (state.value != 0) if analysis.strict else state.live
        inner = x.inner or state
        state = states.make(state.value, live)
    elif "avg_pool" in name:
        inner = x.inner
    return Flow(meta_shape(node), (*x.labels[:first], *[None] * spatial), state, inner=inner)


def _any(padding: Any) -> bool:
    return bool(padding) if isinstance(padding, int) else any(padding)


@rule("mean", "sum", "amax", "amin")
def _reduce(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    x: Flow = bound["self"]
    given = bound.get("dim")
    listed = [given] if isinstance(given, int) else list(given or [])
    dims = sorted({d % x.rank for d in listed}) if listed else list(range(x.rank))
    if op_name(node) == "sum":
        summed_over(analysis, node, x, dims, "a sum")
    else:
        analysis.pin(x, f"reduced over by {where(node)}", dims)
    for dim in dims:
        analysis.sets.claim(x.labels[dim])
    value, live = x.state.value, x.state.live
    count = 1
    for dim in dims:
        if op_name(node) != "mean" and op_name(node) != "sum":
            value = getattr(value, op_name(node))(dim, keepdim=True)
        elif op_name(node) == "mean":
            value = value.double().mean(dim, keepdim=True)
        else:
            count *= x.shape[dim] if value.shape[dim] == 1 else 1
            value = value.double().sum(dim, keepdim=True)
        live = live.any(dim, keepdim=True)
    value = value * count if count > 1 else value
    labels: list[Labels] = [None if d in dims else x.labels[d] for d in range(x.rank)]
    if not bound.get("keepdim", False):
        kept = [d for d in range(x.rank) if d not in dims]
        labels = [labels[d] for d in kept]
        value, live = (t.reshape([t.shape[d] for d in kept]) for t in (value, live))
    return Flow(meta_shape(node), tuple(labels), states.make(value, live))


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp")
def _along_one_dim(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    x: Flow = bound["self"]
    if x.state.all_constant() and x.rank and all(labels is None for labels in x.labels):
        folded = fold(analysis, node, bound)
        if folded is not None:
            return folded
    dim = bound["dim"] % max(x.rank, 1)
    analysis.pin(x, f"mixed along a dimension by {where(node)}", [dim] if x.rank else [])
    return Flow(x.shape, x.labels, states.live(x.rank))
