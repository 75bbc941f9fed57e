"""Ops that mix channels by weights: convolutions, linear layers, matrix products. They are the readers of
channels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .. import states
from ..analysis import Analysis, BiasTarget, Constraint, Flow, Labels, Read, WeightTarget, meta_shape
from ..registry import rule
from ..states import along, per_index
from ..trace import module_path, where

_BIASED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def _bias_target(
    analysis: Analysis, node: Node, weight: Flow, bias: Flow | None, size: int
) -> BiasTarget | None:
    """The bias that can take a constant up, or None where there is none and none can be made."""
    path = module_path(node)
    if bias is not None:
        return None if bias.name is None else BiasTarget(path, bias.name, True, 0, size)
    module = analysis.graph.modules.get(path)
    name = f"{path}." if path else ""
    if weight.name is None or not isinstance(module, _BIASED) or module.bias is not None:
        return None
    if analysis.graph.name_of.get(f"{name}weight") != weight.name:
        return None
    return BiasTarget(path, f"{name}bias", False, 0, size)


def _known(analysis: Analysis, labels: Labels, size: int, what: str) -> Tensor:
    """Labels to put into a read where the tensor has none: they cannot be cut."""
    return analysis.sets.new_pinned(size, what) if labels is None else labels


def _computed(node: Node) -> str:
    return (
        f"the weight of {where(node)} is no parameter but computed (as weight_norm does), and cannot be cut; make it "
        "one first (remove_parametrizations, remove_weight_norm)"
    )


def _outputs_of(analysis: Analysis, node: Node, weight: Flow, dim: int) -> Tensor:
    """The labels of a weight's filters."""
    labels, size = weight.labels[dim], weight.shape[dim]
    if labels is None and size > 1:
        labels = analysis.sets.new_pinned(size, _computed(node))
        analysis.filters_of_computed.append(labels)
    labels = _known(analysis, labels, size, "the only channel")
    analysis.sets.claim(labels)
    return labels


def _read_by(analysis: Analysis, node: Node, inputs: Tensor, own: Labels) -> None:
    """The input channels of a weight are the channels that it reads, and stay where it has none to cut."""
    if own is not None:
        analysis.sets.unify(inputs, own)
    elif inputs.numel() > 1:
        analysis.sets.pin(inputs, _computed(node))


def _dropped(analysis: Analysis, labels: Labels, size: int) -> Labels:
    """Labels as a dimension of a flow carries them: a dimension of size 1 carries none, and its channel
    stays."""
    if size == 1:
        analysis.sets.pin(labels, "the only channel")
        return None
    return labels


def _mixed_state(
    value: Tensor, live: Tensor, uses: Tensor, weight_sum: Callable[[], Tensor], bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """State of the outputs: [outputs] value and live."""
    out_live = (uses & live).any(1)
    out = torch.zeros(uses.shape[0], dtype=torch.float64) if bias is None else bias.double().clone()
    if bool(((value != 0) & ~live).any()) and not bool(out_live.all()):
        out = out + weight_sum() @ torch.where(live, torch.zeros((), dtype=torch.float64), value)
    return out, out_live


# ---------------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d")
def _conv(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    return _convolution(analysis, node, bound, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    return _convolution(analysis, node, bound, transposed=True)


def _convolution(analysis: Analysis, node: Node, bound: dict[str, Any], transposed: bool) -> Flow | None:
    x, weight, bias = bound["input"], bound["weight"], bound.get("bias")
    groups, kernel = bound["groups"], weight.shape[2:]
    if not weight.state.all_constant() or (bias is not None and not bias.state.all_constant()):
        return None
    channel = x.rank - len(kernel) - 1  # 1, or 0 for an input without a batch
    n_in, n_out = x.shape[channel], meta_shape(node)[channel]
    depthwise = groups == n_in and groups > 1
    if (groups > 1 and weight.name is None) or (
        transposed and groups > 1 and not (depthwise and n_in == n_out)
    ):
        return None
    borders = _has_borders(bound, kernel, transposed) or x.inner is not None
    taken = weight.state.value.expand(weight.shape).double()
    if transposed:  # a stride s spreads an input over s outputs: the mean over them is the interior value
        taken = (
            taken.transpose(0, 1) / math.prod(_per_dim(bound["stride"], len(kernel)))
            if groups == 1
            else taken
        )

    inputs = _known(analysis, x.labels[channel], n_in, "an input of the model, or a tensor without channels")
    own_in, own_out = (0, 1) if transposed and groups == 1 else (1, 0)
    outputs = _outputs_of(analysis, node, weight, own_out)
    analysis.pin(weight, "the kernel of a convolution", range(2, weight.rank))
    if bias is not None and bias.labels[0] is not None:
        analysis.sets.unify(outputs, bias.labels[0])
    if weight.name is not None:
        analysis.out_axes[weight.name] = own_out

    value, live, uniform = per_index(x.inner or x.state, channel, n_in)
    if analysis.strict:
        live = live | ~uniform
    bias_value = None if bias is None else bias.state.value.expand(bias.shape)
    if depthwise:
        out_value, out_live = _depthwise(
            analysis, weight, inputs, outputs, taken, value, live, borders, bias_value
        )
    else:
        if groups == 1:
            _read_by(analysis, node, inputs, weight.labels[own_in])
        target = _bias_target(analysis, node, weight, bias, n_out)
        pieces = []
        for g in range(groups):
            of_in, of_out = (slice(g * n // groups, (g + 1) * n // groups) for n in (n_in, n_out))
            kernel_sum = _lazy_sum(taken[of_out])
            read = Read(
                node=node,
                dim=channel,
                start=of_out.start,
                inputs=inputs[of_in],
                outputs=outputs[of_out],
                uses=(taken[of_out] != 0).flatten(2).any(2) if kernel else taken[of_out] != 0,
                value=value[of_in],
                live=live[of_in],
                absorbable=_absorbable(analysis, value[of_in], borders, target),
                refusal=_refusal(borders, target),
                weight_sum=kernel_sum,
                bias=None
                if target is None
                else BiasTarget(target.module, target.name, target.exists, of_out.start, target.size),
                weight=None
                if weight.name is None
                else WeightTarget(
                    weight.name, own_in, None if groups == 1 else range(of_out.start, of_out.stop)
                ),
            )
            analysis.reads.append(read)
            blocked = live[of_in] | ((value[of_in] != 0) & borders & analysis.strict)
            pieces.append(
                _mixed_state(
                    value[of_in],
                    blocked,
                    read.uses,
                    kernel_sum,
                    None if bias_value is None else bias_value[of_out],
                )
            )
        out_value, out_live = (torch.cat(p) for p in zip(*pieces, strict=True))
        if groups > 1:
            _keep_groups(analysis, node, weight, inputs, outputs, groups)
    shape = meta_shape(node)
    labels: list[Labels] = [*x.labels[:channel], _dropped(analysis, outputs, n_out), *[None] * len(kernel)]
    state = states.make(along(out_value, channel, len(shape)), along(out_live, channel, len(shape)))
    return Flow(shape, tuple(labels), state)


def _depthwise(
    analysis: Analysis,
    weight: Flow,
    inputs: Tensor,
    outputs: Tensor,
    taken: Tensor,
    value: Tensor,
    live: Tensor,
    borders: bool,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Each channel makes its own outputs: they leave together, and the weights of a channel leave with it."""
    times = outputs.numel() // inputs.numel()
    analysis.sets.unify(inputs.repeat_interleave(times), outputs)
    _record_groups(analysis, weight, [inputs[i : i + 1] for i in range(inputs.numel())])
    used = (taken != 0).flatten(1).any(1)
    value, live = value.repeat_interleave(times), live.repeat_interleave(times)
    if analysis.strict and borders:
        live = live | (value != 0)
    out = value * taken.flatten(1).sum(1) + (0.0 if bias is None else bias.double())
    return out, live & used


def _keep_groups(
    analysis: Analysis, node: Node, weight: Flow, inputs: Tensor, outputs: Tensor, groups: int
) -> None:
    analysis.pin(weight, "counts the inputs of a group", [1])
    analysis.sets.claim(weight.labels[1])
    ins, outs = list(inputs.chunk(groups)), list(outputs.chunk(groups))
    _record_groups(analysis, weight, ins)
    analysis.constraints.append(Constraint("grouped", where(node), outs, ins, module=module_path(node)))


def _record_groups(analysis: Analysis, weight: Flow, inputs: list[Tensor]) -> None:
    assert weight.name is not None
    known = analysis.grouped_inputs.setdefault(weight.name, inputs)
    if known is not inputs:
        for a, b in zip(known, inputs, strict=True):
            analysis.sets.unify(a, b)


def _has_borders(bound: dict[str, Any], kernel: tuple[int, ...], transposed: bool) -> bool:
    """Whether a constant input gives outputs at the border that differ from those inside."""
    if transposed:
        return any(k > 1 for k in kernel) or any(s > 1 for s in _per_dim(bound["stride"], len(kernel)))
    padding = bound["padding"]
    if isinstance(padding, str):
        return padding == "same" and any(k > 1 for k in kernel)
    return any(p > 0 for p in _per_dim(padding, len(kernel)))


def _per_dim(value: Any, count: int) -> list[int]:
    listed = [value] if isinstance(value, int) else list(value)
    return listed * count if len(listed) == 1 else listed


def _absorbable(analysis: Analysis, value: Tensor, borders: bool, target: BiasTarget | None) -> Tensor:
    possible = target is not None and not (borders and analysis.strict)
    return torch.full_like(value, possible, dtype=torch.bool)


def _refusal(borders: bool, target: BiasTarget | None) -> str:
    if borders:
        return "it is no bias at the zero-padded border"
    return "there is no bias to take it up, and none can be added" if target is None else ""


def _lazy_sum(weight: Tensor) -> Callable[[], Tensor]:
    return lambda: weight.flatten(2).sum(2) if weight.dim() > 2 else weight


# ---------------------------------------------------------------------------------------------------
# Linear layers and matrix products
# ---------------------------------------------------------------------------------------------------


@rule("linear")
def _linear(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    return weighted(analysis, node, bound["input"], bound["weight"], bound.get("bias"), out_dim=0)


@rule("addmm")
def _addmm(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    bias, a, b = bound["self"], bound["mat1"], bound["mat2"]
    if bound["beta"] != 1 or bound["alpha"] != 1 or bias.rank != 1 or a.state.all_constant():
        return None
    return weighted(analysis, node, a, b, bias, out_dim=1)


def weighted(
    analysis: Analysis,
    node: Node,
    x: Flow,
    weight: Flow,
    bias: Flow | None,
    out_dim: int,
    result_dim: int = -1,
) -> Flow | None:
    """y = x W^T + b for a weight [out, in] (out_dim 0), y = x W + b for a weight [in, out] (out_dim 1).

    The node's result may have its dimensions in another order, the outputs along `result_dim`; the flow that is
    returned has them last."""
    if (
        weight.rank != 2
        or not weight.state.all_constant()
        or (bias is not None and not bias.state.all_constant())
    ):
        return None
    if bias is not None and (bias.rank != 1 or bias.shape[0] != weight.shape[out_dim]):
        return None
    n_out, n_in = weight.shape[out_dim], weight.shape[1 - out_dim]
    matrix = weight.state.value.expand(weight.shape)
    matrix = matrix.t() if out_dim else matrix
    inputs = _known(analysis, x.labels[-1], n_in, "an input of the model, or a tensor without channels")
    outputs = _outputs_of(analysis, node, weight, out_dim)
    _read_by(analysis, node, inputs, weight.labels[1 - out_dim])
    if bias is not None and bias.labels[0] is not None:
        analysis.sets.unify(outputs, bias.labels[0])
    if weight.name is not None:
        analysis.out_axes.setdefault(weight.name, out_dim)
    value, live, uniform = per_index(x.state, -1, n_in)
    if analysis.strict:
        live = live | ~uniform
    target = _bias_target(analysis, node, weight, bias, n_out)
    read = Read(
        node=node,
        dim=result_dim % x.rank,
        start=0,
        inputs=inputs,
        outputs=outputs,
        uses=matrix != 0,
        value=value,
        live=live,
        absorbable=_absorbable(analysis, value, False, target),
        refusal=_refusal(False, target),
        weight_sum=matrix.double,
        bias=target,
        weight=None if weight.name is None else WeightTarget(weight.name, 1 - out_dim),
    )
    analysis.reads.append(read)
    out, out_live = _mixed_state(
        value, live, read.uses, read.weight_sum or matrix.double, None if bias is None else bias.state.value
    )
    shape = (*x.shape[:-1], n_out)
    labels = (*x.labels[:-1], _dropped(analysis, outputs, n_out))
    return Flow(shape, labels, states.make(along(out, -1, len(shape)), along(out_live, -1, len(shape))))


@rule("embedding")
def _embedding(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    weight, indices = bound["weight"], bound["indices"]
    for labels in weight.labels:
        analysis.sets.claim(labels)
    analysis.pin(weight, f"a table that {where(node)} looks up")
    shape = meta_shape(node)
    return Flow(shape, (*indices.labels, weight.labels[1]), states.live(len(shape)))
