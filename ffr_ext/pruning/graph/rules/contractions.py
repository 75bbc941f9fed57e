"""Ops that sum over channels without weights of their own: products of two tensors of the network, einsum, sums and
vector norms. A channel of zeros adds nothing and may leave; every other one stays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..analysis import Analysis, Flow, Labels, Read, meta_shape
from ..registry import rule
from ..states import State, per_index
from ..trace import op_name, where
from .layers import weighted
from .pointwise import combined_labels, fold


def read_all_but_zeros(
    analysis: Analysis, node: Node, labels: Tensor, value: Tensor, live: Tensor, what: str
) -> None:
    """All of the result depends on every channel that is not 0."""
    some_output = analysis.sets.new_pinned(1, "a result")
    analysis.reads.append(
        Read(
            node=node,
            dim=None,
            start=0,
            inputs=labels,
            outputs=some_output,
            uses=torch.ones(1, labels.numel(), dtype=torch.bool),
            value=value,
            live=live,
            absorbable=torch.zeros_like(live),
            refusal=f"{what} counts every value other than 0",
        )
    )


def summed_over(analysis: Analysis, node: Node, x: Flow, dims: list[int], what: str) -> None:
    for dim in dims:
        labels = x.labels[dim]
        if labels is None:
            continue
        if sum(x.labels[d] is not None for d in dims) > 1:
            analysis.pin(x, f"reduced over by {where(node)}", [dim])
            analysis.sets.claim(labels)
            continue
        value, live, uniform = per_index(x.state, dim, x.shape[dim])
        read_all_but_zeros(analysis, node, labels, value, live | ~uniform, what)


# ---------------------------------------------------------------------------------------------------
# Sums and norms
# ---------------------------------------------------------------------------------------------------


def _dims(given: Any, rank: int) -> list[int]:
    listed = [given] if isinstance(given, int) else list(given or [])
    return sorted({d % rank for d in listed}) if listed else list(range(rank))


def _reduced(x: Flow, dims: list[int], keepdim: bool, shape: tuple[int, ...]) -> tuple[Labels, ...]:
    labels: list[Labels] = [None if d in dims else x.labels[d] for d in range(x.rank)]
    return tuple(labels if keepdim else [labels[d] for d in range(x.rank) if d not in dims])


@rule("linalg_vector_norm", "norm", "linalg_norm", "frobenius_norm")
def _norm(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    """Vector norms, and those matrix norms that are vector norms of all entries."""
    x: Flow = bound["self"] if "self" in bound else bound["A"]
    if x.state.all_constant():
        return fold(analysis, node, bound)
    order = bound.get("ord", bound.get("p"))
    dims = _dims(bound.get("dim"), x.rank)
    entries = order is None or (len(dims) == 1 and isinstance(order, int | float))
    entries |= op_name(node) in ("linalg_vector_norm", "norm") and isinstance(order, int | float)
    entries |= order == "fro" or op_name(node) == "frobenius_norm"
    power = 2.0 if order is None or isinstance(order, str) else float(order)
    if not entries or power < 0:
        return None
    summed_over(analysis, node, x, dims, "a norm")
    shape = meta_shape(node)
    labels = _reduced(x, dims, len(shape) == x.rank, shape)
    zero = x.state.zero()
    for dim in dims:
        zero = zero.all(dim, keepdim=True)
    if len(shape) != x.rank:
        zero = zero.reshape([zero.shape[d] for d in range(x.rank) if d not in dims])
    return Flow(shape, labels, State(torch.zeros_like(zero, dtype=torch.float64), ~zero))


# ---------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------


@rule("mm", "matmul", "bmm")
def _matmul(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    a: Flow = bound["self"]
    b: Flow = bound["mat2"] if "mat2" in bound else bound["other"]
    if b.rank == 2 and b.state.all_constant() and not a.state.all_constant() and a.rank >= 2:
        return weighted(analysis, node, a, b, None, out_dim=1)
    if a.rank < 2 or b.rank < 2:
        return None
    letters = "ABCDEFGHIJKLMNOPQRSTUVW"
    batch = letters[: len(meta_shape(node)) - 2]
    own = [batch[len(batch) - (f.rank - 2) :] for f in (a, b)]
    flow = _contraction(analysis, node, [a, b], [f"{own[0]}XY", f"{own[1]}YZ"], f"{batch}XZ")
    return _mean(flow, b) if flow is not None and _sums_to_one(node.args[0]) else flow


_SAME_ROWS = ("to", "contiguous", "clone", "dropout", "view", "reshape", "expand", "unsqueeze", "squeeze")


def _sums_to_one(weights: Any) -> bool:
    """The last dimension is that of a softmax over it, as in attention that is written out."""
    while isinstance(weights, Node) and weights.op == "call_function" and op_name(weights) in _SAME_ROWS:
        source = weights.args[0]
        if not isinstance(source, Node) or source.meta["val"].shape[-1:] != weights.meta["val"].shape[-1:]:
            return False
        weights = source
    if not isinstance(weights, Node) or op_name(weights) not in ("softmax", "_softmax"):
        return False
    return weights.args[1] in (-1, weights.meta["val"].dim() - 1)


def _mean(flow: Flow, values: Flow) -> Flow:
    """What is the same for all steps is a mean of equal values, whatever the weights of the mean."""
    least, most = (f(values.state.value.double(), -2, keepdim=True) for f in (torch.amin, torch.amax))
    changes = values.state.live.any(-2, keepdim=True) | (least != most)
    live = flow.state.live & changes
    return Flow(flow.shape, flow.labels, State(torch.where(changes, 0.0, least).expand(live.shape), live))


@rule("einsum")
def _einsum(analysis: Analysis, node: Node, bound: dict[str, Any]) -> Flow | None:
    flows: list[Flow] = list(bound["tensors"])
    if all(f.state.all_constant() for f in flows):
        return fold(analysis, node, bound)
    terms = _terms(bound["equation"], [f.rank for f in flows], len(meta_shape(node)))
    if terms is None:
        return None
    operands, result = terms
    if len(flows) == 2:
        for x, weight in ((0, 1), (1, 0)):
            flow = _by_a_matrix(
                analysis, node, flows[x], flows[weight], operands[x], operands[weight], result
            )
            if flow is not None:
                return flow
    return _contraction(analysis, node, flows, operands, result)


def _terms(equation: str, ranks: list[int], rank: int) -> tuple[list[str], str] | None:
    """The letters of each operand and of the result, an ellipsis spelt out. None for diagonals."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow:
        counts = {c: left.count(c) for c in sorted(set(left) - set(",."))}
        right = ("..." if "..." in left else "") + "".join(c for c, n in counts.items() if n == 1)
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    widths = [r - len(t.replace("...", "")) for t, r in zip(operands, ranks, strict=True)]
    names = "".join(spare[: max(widths, default=0)])
    operands = [t.replace("...", names[len(names) - w :]) for t, w in zip(operands, widths, strict=True)]
    result = right.replace("...", names)
    whole = [*operands, result]
    return (operands, result) if all(len(set(t)) == len(t) for t in whole) and len(result) == rank else None


def _by_a_matrix(
    analysis: Analysis, node: Node, x: Flow, weight: Flow, own: str, matrix: str, result: str
) -> Flow | None:
    """A linear layer written as einsum: one letter of a parameter is summed over, the other is new."""
    read, made = set(matrix) & set(own) - set(result), set(matrix) & set(result) - set(own)
    if weight.rank != 2 or not weight.state.all_constant() or len(read) != 1 or len(made) != 1:
        return None
    if set(own) - read != set(result) - made or x.state.all_constant():
        return None
    at = {c: d for d, c in enumerate(own)}
    (before,), (after,) = read, made
    rest = [c for c in result if c != after]

    def to_last(tensor: Tensor) -> Tensor:
        return tensor.permute([*(at[c] for c in rest), at[before]])

    shape = tuple(x.shape[at[c]] for c in [*rest, before])
    labels = tuple(x.labels[at[c]] for c in [*rest, before])
    state = State(to_last(x.state.value), to_last(x.state.live))
    flow = weighted(
        analysis, node, Flow(shape, labels, state), weight, None, matrix.index(after), result.index(after)
    )
    if flow is None:
        return None
    order = [[*rest, after].index(c) for c in result]
    moved = State(flow.state.value.permute(order), flow.state.live.permute(order))
    return Flow(meta_shape(node), tuple(flow.labels[d] for d in order), moved)


def _contraction(
    analysis: Analysis, node: Node, flows: list[Flow], operands: list[str], result: str
) -> Flow | None:
    """Sum of products over the letters that the result has not. A product is 0 where one of its factors is."""
    shape = meta_shape(node)
    aligned = [_aligned(f, t, result) for f, t in zip(flows, operands, strict=True)]
    labels = combined_labels(analysis, node, aligned, shape)
    summed = sorted(set("".join(operands)) - set(result))
    wide = [
        c
        for c in summed
        if any(f.labels[t.index(c)] is not None for f, t in zip(flows, operands, strict=True) if c in t)
    ]
    for letter in wide:
        holders = [(f, t.index(letter)) for f, t in zip(flows, operands, strict=True) if letter in t]
        size = max(f.shape[d] for f, d in holders)
        reason = f"summed over by {where(node)}"
        vector: Labels = holders[0][0].labels[holders[0][1]]
        for flow, dim in holders[1:]:
            vector = analysis.unify(vector, flow.labels[dim], reason)
        if vector is None:
            continue
        analysis.sets.claim(vector)
        if len(wide) > 1 or any(f.shape[d] != size for f, d in holders):
            for flow, dim in holders:
                analysis.pin(flow, reason, [dim])
            continue
        zero = torch.zeros(size, dtype=torch.bool)
        for flow, dim in holders:
            value, live, uniform = per_index(flow.state, dim, size)
            zero |= (value == 0) & ~live & uniform
        read_all_but_zeros(analysis, node, vector, torch.zeros(size).double(), ~zero, "a sum of products")
    zero = torch.zeros((1,) * len(shape), dtype=torch.bool)
    for flow in aligned:
        zero = zero | flow.state.zero()
    return Flow(shape, labels, State(torch.zeros_like(zero, dtype=torch.float64), ~zero))


def _aligned(flow: Flow, letters: str, result: str) -> Flow:
    """The flow with the dimensions of the result: 0 where it is 0 for all that is summed over."""
    zero = flow.state.zero()
    kept = [c for c in letters if c in result]
    for dim, c in enumerate(letters):
        if c not in result:
            zero = zero.all(dim, keepdim=True)
    zero = zero.permute(
        [letters.index(c) for c in sorted(kept, key=result.index)]
        + [d for d, c in enumerate(letters) if c not in result]
    )
    sizes = dict(zip(sorted(kept, key=result.index), zero.shape, strict=False))
    zero = zero.reshape([sizes.get(c, 1) for c in result])
    at = {c: d for d, c in enumerate(letters)}
    shape = tuple(flow.shape[at[c]] if c in at else 1 for c in result)
    labels = tuple(flow.labels[at[c]] if c in at else None for c in result)
    return Flow(shape, labels, State(torch.zeros_like(zero, dtype=torch.float64), ~zero))
