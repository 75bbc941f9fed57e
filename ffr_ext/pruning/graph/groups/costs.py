"""What a model costs without some of its channels, from channel counts alone: no model is built to find out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .... import _torch
from ..analysis import Analysis, Flow
from ..solver import Solver
from ..states import on_cpu
from ..trace import op_name


class Costs:
    """FLOPs and parameters of the model without some channels.

    Args:
        solver: Of the model as it is.
        whole: ``"flops"`` and ``"parameters"`` of that, measured. What is no product of known channels stays as it is:
            attention, parameters that the graph does not read.
    """

    @on_cpu
    def __init__(self, solver: Solver, whole: Mapping[str, float]) -> None:
        analysis, channel_of = solver.analysis, solver.sets.channel_of
        # FLOPs for each pair of an output and an input channel, the outputs, the inputs.
        self._products: list[tuple[float, Tensor, Tensor]] = []
        reads: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for read, inputs, outputs in solver.reads:
            reads.setdefault(read.node, []).append((outputs, inputs))
        for node in analysis.graph.nodes:
            weight = _weight(analysis, node)
            if weight is None:
                continue
            pairs = reads.get(node) or _passed_on(analysis, node, channel_of)
            count = sum(outputs.numel() * inputs.numel() for outputs, inputs in pairs)
            each = _node_flops(analysis, node, weight) / max(count, 1)
            self._products += [(each, outputs, inputs) for outputs, inputs in pairs]
        self._parameters = _parameter_axes(solver)
        self._whole = dict(whole)
        nothing = torch.zeros(len(solver.sets), dtype=torch.bool)
        self._rest = {name: self._whole[name] - counted for name, counted in self._count(nothing).items()}

    def shares(self, removed: Tensor) -> dict[str, float]:
        """What is left of the FLOPs and parameters without these channels of the solver."""
        counted = self._count(removed)
        return {
            name: (counted[name] + self._rest[name]) / whole if whole else 1.0
            for name, whole in self._whole.items()
        }

    def _count(self, removed: Tensor) -> dict[str, float]:
        kept = ~removed
        flops = sum(each * int(kept[o].sum()) * int(kept[i].sum()) for each, o, i in self._products)
        parameters = sum(
            fixed * math.prod(max(int(kept[c].sum()) for c in choices) for choices in axes)
            for fixed, axes in self._parameters
        )
        return {"flops": float(flops), "parameters": float(parameters)}


def _weight(analysis: Analysis, node: Any) -> Flow | None:
    """The weight of a convolution, linear layer or product with a constant matrix."""
    if node.op != "call_function" or not isinstance(analysis.made.get(node), Flow):
        return None
    schema = _torch.schema(node.target)
    if schema is None or not op_name(node).startswith(("conv", "linear", "mm", "matmul", "bmm", "addmm")):
        return None
    given = dict(zip([a.name for a in schema.arguments], node.args, strict=False), **node.kwargs)
    values = [given[key] for key in ("weight", "mat2", "other") if key in given]
    flow = analysis.flows.get(values[0]) if values else None
    return flow if isinstance(flow, Flow) and flow.state.all_constant() else None


def _node_flops(analysis: Analysis, node: Any, weight: Flow) -> float:
    """Twice the multiply-adds, as `torch.utils.flop_counter` counts."""
    size = math.prod(weight.shape)
    if op_name(node).startswith("conv_transpose"):  # each input is spread by a kernel for each output channel
        return 2 * math.prod(tuple(node.args[0].meta["val"].shape)) * size / weight.shape[0]
    outputs = weight.shape[0] if op_name(node).startswith(("conv", "linear")) else weight.shape[-1]
    return 2 * math.prod(analysis.made[node].shape) * size / outputs


def _passed_on(analysis: Analysis, node: Any, channel_of: Tensor) -> list[tuple[Tensor, Tensor]]:
    """A depthwise convolution has no reads: its FLOPs are those of the channels that pass."""
    flow = analysis.made[node]
    labels = next((v for v in flow.labels if v is not None), None)
    if labels is None:
        return []
    channels = channel_of[labels]
    return [(channels[i : i + 1], channels[i : i + 1]) for i in range(channels.numel())]


def _parameter_axes(solver: Solver) -> list[tuple[float, list[list[Tensor]]]]:
    """For each parameter the size of its dimensions that stay, and the channels of each of the others. (The inputs of
    a grouped convolution: those of each of its groups, of which all keep as many.)"""
    found = []
    channel_of = solver.sets.channel_of
    for name, tensor in solver.analysis.graph.tensors.items():
        if not isinstance(tensor, nn.Parameter):
            continue
        axes: dict[int, list[Tensor]] = {
            dim: [solver.axes[name, dim]] for dim in range(tensor.dim()) if (name, dim) in solver.axes
        }
        grouped = solver.analysis.grouped_inputs.get(name)
        if grouped is not None and tensor.shape[1] > 1:
            axes[1] = [channel_of[labels] for labels in grouped]
        fixed = math.prod(s for dim, s in enumerate(tensor.shape) if dim not in axes)
        found.append((float(fixed), list(axes.values())))
    return found
