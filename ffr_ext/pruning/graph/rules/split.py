"""Splits into consecutive parts, and the gate of two halves."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from .. import states
from ..analysis import Analysis, Constraint, Flow
from ..registry import rule
from ..states import State
from ..trace import module_path, where
from .pointwise import combined_labels


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk")
def _split(analysis: Analysis, node: Node, bound: dict[str, Any]) -> list[Flow] | None:
    flow: Flow = bound["self"]
    dim = bound["dim"] % flow.rank
    return parts_of(
        analysis, node, flow, dim, [v.shape[dim] for v in node.meta["val"]], _split_list(node, bound)
    )


def _split_list(node: Node, bound: dict[str, Any]) -> list[int] | None:
    """The sizes of a split that were given one by one."""
    sizes = bound.get("split_sizes") or bound.get("split_size")
    return list(sizes) if isinstance(sizes, list | tuple) else None


def _kept_by_module(analysis: Analysis, node: Node, sizes: list[int]) -> str | None:
    """ "list" where the module keeps the sizes of a split as one attribute, "numbers" where each is one of its own."""
    module = analysis.graph.modules.get(module_path(node))
    values = [] if module is None else list(vars(module).values())
    if any(isinstance(v, list | tuple) and list(v) == sizes for v in values):
        return "list"
    return "numbers" if set(sizes) <= {v for v in values if type(v) is int} else None


def parts_of(
    analysis: Analysis, node: Node, flow: Flow, dim: int, sizes: list[int], given: list[int] | None = None
) -> list[Flow]:
    """The flow cut into consecutive parts. Equal parts stay equal: as many channels leave each. Where the module
    keeps the sizes `given` to the split, they follow, and as many as can leave each part."""
    dim %= flow.rank
    vector = flow.labels[dim]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    if vector is not None and len(sizes) > 1:
        parts = [vector[e - s : e] for e, s in zip(ends, sizes, strict=True)]
        kept = None if given is None else _kept_by_module(analysis, node, given)
        analysis.divided.append((module_path(node), parts))
        if kept == "list" or (kept == "numbers" and len(set(sizes)) == len(sizes)):
            analysis.sets.claim(vector)
        elif len(set(sizes)) == 1:
            analysis.constraints.append(Constraint("equal", where(node), parts))
        else:
            analysis.pin(flow, f"split into unequal parts by {where(node)}", [dim])
    return [narrowed(flow, dim, e - s, s) for e, s in zip(ends, sizes, strict=True)]


def narrowed(flow: Flow, dim: int, start: int, size: int, step: int = 1) -> Flow:
    index = slice(start, start + size * step, step)
    vector = flow.labels[dim]
    cut = None if vector is None or size == 1 else vector[index]

    def narrow(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[dim] == 1 else tensor[(slice(None),) * dim + (index,)]

    return Flow(
        (*flow.shape[:dim], size, *flow.shape[dim + 1 :]),
        (*flow.labels[:dim], cut, *flow.labels[dim + 1 :]),
        State(narrow(flow.state.value), narrow(flow.state.live)),
    )


@rule("glu")
def _glu(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    halves = parts_of(
        analysis, node, bound["self"], bound["dim"], [bound["self"].shape[bound["dim"]] // 2] * 2
    )
    shape = halves[0].shape
    labels = combined_labels(analysis, node, halves, shape)
    a, b = halves[0].state, halves[1].state
    live = (a.live | b.live) & ~a.zero()
    return Flow(shape, labels, states.make(a.value.double() * b.value.double().sigmoid(), live))
