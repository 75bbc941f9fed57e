"""Recurrent layers: they read the channels of their inputs at every step, and constants go into their input biases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from .... import _torch
from .. import states
from ..analysis import Analysis, BiasTarget, Flow, Read, WeightTarget, meta_shape, unknown_flow
from ..registry import rule
from ..states import per_index
from ..trace import module_path, where
from .pointwise import combined_labels

_LAYERS = (nn.RNNBase, nn.RNNCellBase)


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Any:
    """All layers at once: the first one reads the input, in both directions."""
    if "input" not in bound:  # a packed sequence, which torch.export does not trace so far
        return None
    x: Flow = bound["input"]
    weights: list[Flow] = list(bound["params"])
    directions = 2 if bound["bidirectional"] else 1
    each = len(weights) // (directions * bound["num_layers"])
    first = [weights[d * each : (d + 1) * each] for d in range(directions)]
    if not all(w.state.all_constant() for w in weights):
        return None
    for direction in first:
        _read_input(analysis, node, x, direction[0], direction[2] if bound["has_biases"] else None)
    _stay(analysis, node, x, [direction[0] for direction in first], [bound["hx"], weights])
    return _torch.tree_map(unknown_flow, node.meta["val"])


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Any:
    weights = [
        f for f in (bound["w_ih"], bound["w_hh"], bound.get("b_ih"), bound.get("b_hh")) if f is not None
    ]
    if not all(w.state.all_constant() for w in weights):
        return None
    _read_input(analysis, node, bound["input"], bound["w_ih"], bound.get("b_ih"))
    _stay(analysis, node, bound["input"], [bound["w_ih"]], [bound["hx"], weights])
    return _torch.tree_map(unknown_flow, node.meta["val"])


@rule("pad_sequence")
def _pad_sequence(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow:
    """Sequences of several lengths [L, ..] as one tensor [B, T, ..]: constant where the padding is the same number."""
    flows: list[Flow] = list(bound["sequences"])
    shape = meta_shape(node)
    rows, is_live = [], torch.zeros((1,) * len(shape), dtype=torch.bool)
    padding = torch.tensor(float(bound["padding_value"]), dtype=torch.float64)
    for flow in flows:
        analysis.pin(flow, f"the steps of {where(node)}", [0])
        value, live = flow.state.value.double()[None], flow.state.live[None]
        rows.append(Flow((1, 1, *flow.shape[1:]), (None, None, *flow.labels[1:]), states.live(len(shape))))
        differs = (value != padding).any(1, keepdim=True)
        is_live = is_live | live.any(1, keepdim=True) | differs
    labels = combined_labels(analysis, node, rows, (1, 1, *shape[2:]))
    return Flow(shape, labels, states.make(padding.expand(is_live.shape).clone(), is_live))


def _read_input(analysis: Analysis, node: Node, x: Flow, weight: Flow, bias: Flow | None) -> None:
    """The gates of a step, W x + b, whatever is made of them."""
    n_out, n_in = weight.shape
    inputs, outputs = x.labels[-1], weight.labels[0]
    if inputs is None:
        inputs = analysis.sets.new_pinned(n_in, "an input of the model, or a tensor without channels")
    own = weight.labels[1]
    if own is not None:
        analysis.sets.unify(inputs, own)
    elif n_in > 1:
        analysis.sets.pin(inputs, f"the weight of {where(node)} is no parameter")
    if outputs is None:
        outputs = analysis.sets.new_pinned(n_out, "the only gate")
    path = module_path(node)
    if isinstance(analysis.graph.modules.get(path), _LAYERS):
        analysis.sized.append((path, "input_size", inputs))
    value, live, uniform = per_index(x.state, -1, n_in)
    if analysis.strict:
        live = live | ~uniform
    target = None if bias is None or bias.name is None else BiasTarget(path, bias.name, True, 0, n_out)
    matrix: Tensor = weight.state.value.expand(weight.shape)
    analysis.reads.append(
        Read(
            node=node,
            dim=None,
            start=0,
            inputs=inputs,
            outputs=outputs,
            uses=matrix != 0,
            value=value,
            live=live,
            absorbable=torch.full_like(live, target is not None),
            refusal="" if target is not None else "the layer has no biases",
            weight_sum=matrix.double,
            bias=target,
            weight=None if weight.name is None else WeightTarget(weight.name, 1),
        )
    )


def _stay(analysis: Analysis, node: Node, x: Flow, readers: list[Flow], others: list[Any]) -> None:
    """Hidden sizes stay, because all gates count them, and so do steps."""
    analysis.pin(x, f"the steps of {where(node)}", range(x.rank - 1))
    reason = f"a hidden size of {where(node)}"
    for flow in readers:
        analysis.pin(flow, reason, [0])
    for flow in _torch.tree_leaves(others):
        if isinstance(flow, Flow) and not any(flow is r for r in readers):
            analysis.pin(flow, reason)
