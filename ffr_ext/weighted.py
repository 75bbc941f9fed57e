"""The usual loss in eager mode as one autograd node, with as little Python as possible.

Tiny features cost what a call costs, whatever the kernels do. So all that follows from the shapes is worked
out once and kept (`Recipe`); the node has one output and makes its context in `forward`, which saves torch
from binding arguments and from wrapping outputs that nobody differentiates; and on the CPU the handful of
sums is weighted in Python, where three torch operators would take longer than the kernel
(docs/performance.md, "Whole call").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .autograd import DOUBLE_BACKWARD
from .stages import Layout, Plan, make_plan, walk_as_they_lie

# Shape, strides and dtype of every feature: all that plans and recipes depend on.
Signature = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]


@dataclass(slots=True)
class Recipe:
    """What a call needs to know besides the values: of the features that are in a term, stage after stage."""

    walked: tuple[int, ...] | None  # which of the listed features; None: all
    lengths: tuple[int, ...]
    numels: list[int]
    groups: list[int]
    entries: int  # of stats
    sign_bytes: int
    layouts: Signature


class EntryWeights(NamedTuple):
    """d loss / d entry of stats: on the features' device, and as numbers where that is the CPU."""

    tensor: Tensor
    numbers: list[float] | None

    @classmethod
    def of(cls, tensor: Tensor) -> EntryWeights:
        return cls(tensor, tensor.tolist() if tensor.device.type == "cpu" else None)


def signature(features: Sequence[Tensor]) -> Signature:
    """The key under which a recipe is kept."""
    return tuple([(f.shape, f.stride(), f.dtype) for f in features])


@lru_cache(maxsize=256)
def prepare(signature: Signature, transition: str) -> tuple[Plan, Recipe | None]:
    """The plan, and the recipe unless some features must be mapped, promoted or copied first."""
    plan = make_plan([tuple(shape) for shape, _, _ in signature], transition)
    indices: list[int] = []
    for stage in plan.stages:
        run = range(stage.first, stage.first + stage.own)
        layouts = [Layout(*signature[i], _contiguous(*signature[i][:2])) for i in run]
        uniform = all(layout.dtype == layouts[0].dtype for layout in layouts)
        if stage.tail or not uniform or not walk_as_they_lie(layouts, per_sample=False):
            return plan, None
        indices += run
    lengths = tuple(stage.length for stage in plan.stages)
    numels = [stage.numel for stage in plan.stages]
    return plan, Recipe(
        walked=None if len(indices) == len(signature) else tuple(indices),
        lengths=lengths,
        numels=numels,
        groups=[1] * len(lengths),
        entries=sum(ops.stats_entries(length, 1) for length in lengths),
        sign_bytes=sum(ops.sign_bytes(length, numel) for length, numel in zip(lengths, numels, strict=True)),
        layouts=tuple(signature[i] for i in indices),
    )


def _contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """What `Tensor.is_contiguous` says of a tensor with this shape and these strides."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def weighted_flow(
    recipe: Recipe,
    features: list[Tensor],
    weights: EntryWeights,
    dtype: torch.dtype,
    squared: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(`(weights * stats).sum().to(dtype)`, stats) of all listed features, which `signature` has seen."""
    if recipe.walked is not None:
        features = [features[i] for i in recipe.walked]
    wants_gradient = torch.is_grad_enabled() and any(f.requires_grad for f in features)
    made: list[Tensor] = []
    kernels = ops.flow_kernels(backend)
    loss = _apply(recipe, weights, dtype, squared, kernels, wants_gradient, made, *features)
    return loss, made[0]


def _total(weights: EntryWeights, stats: Tensor, dtype: torch.dtype) -> Tensor:
    """`(weights * stats).sum().to(dtype)`, on the CPU added up one after another."""
    vector, numbers = weights
    if numbers is None:
        return (vector * stats).sum().to(dtype)
    total = sum(map(mul, numbers, stats.tolist()))
    # scalar_tensor is twice as fast, but refuses what overflows instead of making it inf.
    make = torch.scalar_tensor if abs(total) <= _FLOAT32_MAX else torch.tensor
    return make(total, dtype=dtype, device=vector.device)


class _WeightedSum(torch.autograd.Function):
    """The same sum of stats that another node has made, to the same last bit."""

    @staticmethod
    def forward(ctx: Any, weights: EntryWeights, dtype: torch.dtype, stats: Tensor) -> Tensor:
        ctx.vector = weights.tensor
        return _total(weights, stats, dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[None, None, Tensor]:
        return None, None, ctx.vector * grad_loss


def weighted_sum(stats: Tensor, weights: EntryWeights, dtype: torch.dtype) -> Tensor:
    """`(weights * stats).sum().to(dtype)`, differentiable in stats; what `weighted_flow` returns for these."""
    total: Tensor = _apply_sum(weights, dtype, stats)
    return total


class _WeightedFlow(torch.autograd.Function):
    """The node. Without setup_context: neither torch.func nor a tracer gets here (`checks.runs_eagerly`)."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        weights: EntryWeights,
        dtype: torch.dtype,
        squared: bool,
        kernels: ops.FlowKernels,
        wants_gradient: bool,
        made: list[Tensor],
        *features: Tensor,
    ) -> Tensor:
        vector = weights.tensor
        stats = vector.new_empty(recipe.entries)
        saves_signs = wants_gradient and not squared
        signs = vector.new_empty(recipe.sign_bytes if saves_signs else 0, dtype=torch.uint8)
        kernels.forward(features, recipe.lengths, recipe.groups, squared, stats, signs)
        made.append(stats)
        if wants_gradient:
            ctx.set_materialize_grads(False)
            ctx.call = recipe, weights, squared, kernels
            # For l1 the signs are all that the backward pass reads; the other norms read the features again.
            if squared:
                ctx.save_for_backward(*features)
            else:
                ctx.save_for_backward(signs)
        return _total(weights, stats, dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        saved = ctx.saved_tensors
        recipe, (vector, numbers), squared, kernels = ctx.call
        wanted = ctx.needs_input_grad[_NOT_FEATURES:]
        device = vector.device
        grads: list[Any] = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device) if want else None
            for (shape, strides, dtype), want in zip(recipe.layouts, wanted, strict=True)
        ]
        slots = grads
        if not all(wanted):
            nothing = vector.new_empty(0)
            slots = [nothing if grad is None else grad for grad in grads]
        # On the CPU the usual upstream gradient, 1, costs no multiplication. Elsewhere asking would wait, and compiled
        # autograd cannot ask.
        can_ask = numbers is not None and not torch.compiler.is_compiling()
        coef = vector if can_ask and grad_loss.item() == 1.0 else vector * grad_loss
        features, signs = (saved, vector.new_empty(0, dtype=torch.uint8)) if squared else ((), saved[0])
        kernels.backward(features, signs, coef, recipe.lengths, recipe.numels, recipe.groups, squared, slots)
        return (*_NONES, *grads)


_FLOAT32_MAX = torch.finfo(torch.float32).max
_NOT_FEATURES = 7
_NONES = (None,) * _NOT_FEATURES
# Without the argument binding that Function.apply does for functions with setup_context, and its check for torch.func.
_apply = super(torch.autograd.Function, _WeightedFlow).apply
_apply_sum = super(torch.autograd.Function, _WeightedSum).apply
