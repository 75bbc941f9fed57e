"""The autograd node of the loss: what is saved, what is refused.

`FlowStats` maps the features of a network to the sums of its difference norms (`stats`, design.md section 5). What the
loss makes of them (roots, angles, weights, means) is ordinary differentiable arithmetic on that tiny tensor.

Saved for backward: for l1 the packed signs only (0.5 byte an element), for the other norms the features
themselves, which autograd keeps without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import compiled, ops
from ._torch import transforms_active
from .stages import Layout, Sums, align, kernel_layouts, with_layout

DOUBLE_BACKWARD = (
    "ffr_ext: the gradient of the feature-flow loss was asked for with create_graph=True, but its second "
    "derivative is not implemented. Compute the loss with backend='reference' to differentiate twice."
)
VMAP = (
    "ffr_ext: the fused feature-flow kernels do not support torch.vmap. Loop over the samples, or compute the "
    "loss with backend='reference'."
)


Item = TypeVar("Item", Tensor, Layout)


@dataclass(frozen=True)
class FlowSpec:
    """The settings of one node that are not tensors."""

    sums: Sums
    lengths: tuple[int, ...]  # features per stage
    save_signs: bool  # a gradient of the absolute values will be wanted

    def by_stage(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """Cut a flat sequence into one slice per stage."""
        slices, first = [], 0
        for length in self.lengths:
            slices.append(items[first : first + length])
            first += length
        return slices

    def groups(self, stages: Sequence[Sequence[Item]]) -> list[int]:
        """Groups of sums of each stage."""
        leading = self.sums.leading
        return [math.prod(stage[0].shape[:leading]) for stage in stages] if leading else [1] * len(stages)


def _forward(spec: FlowSpec, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The forward pass: (stats, signs)."""
    squared, leading, backend = spec.sums
    stages = spec.by_stage(features)
    groups = spec.groups(stages)
    features = [f for stage in stages for f in align(stage, leading)]
    if torch.compiler.is_compiling():
        return compiled.flow_stats(features, spec.lengths, groups, squared, spec.save_signs, backend)
    stats, signs = compiled.empty_stats(features, spec.lengths, groups, spec.save_signs)
    ops.flow_kernels(backend).forward(features, spec.lengths, groups, squared, stats, signs)
    return stats, signs


def _save(ctx: Any, spec: FlowSpec, features: Sequence[Tensor], signs: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.spec = spec
    # Shapes and strides instead of the features: l1 needs nothing else of them.
    ctx.layouts = tuple([Layout.of(f) for f in features])
    ctx.save_for_backward(*(features if spec.sums.squared else (signs,)))


def _feature_gradients(ctx: Any, wanted: tuple[bool, ...], coef: Tensor) -> list[Tensor | None]:
    """The backward pass, one entry per feature, from d loss / d stats."""
    call = ctx.spec, ctx.layouts, wanted, coef
    if not torch.is_grad_enabled():
        grads = iter(_flow_gradients(*call, ctx.saved_tensors))
    elif transforms_active():
        # torch.func.grad always records its backward pass; only differentiating that record is refused.
        grads = iter(_RefusedTwice.apply(*call, *ctx.saved_tensors))
    else:
        raise RuntimeError(DOUBLE_BACKWARD)
    return [next(grads) if want else None for want in wanted]


class FlowStats(torch.autograd.Function):
    """`FlowStats.apply(spec, *features) -> (stats, signs)`; differentiable in the features, once."""

    @staticmethod
    def forward(spec: FlowSpec, *features: Tensor) -> tuple[Tensor, Tensor]:
        return _forward(spec, features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        spec, *features = inputs
        _stats, signs = output
        ctx.mark_non_differentiable(signs)
        _save(ctx, spec, features, signs)

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, _signs: None) -> tuple[Tensor | None, ...]:
        if grad_stats is None:
            return (None,) * len(ctx.needs_input_grad)
        return (None, *_feature_gradients(ctx, ctx.needs_input_grad[1:], grad_stats))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(VMAP)


class FlowProduct(torch.autograd.Function):
    """`FlowProduct.apply(spec, weights, dtype, made, *features)`: `(stats * weights).sum().to(dtype)` in one node, with
    stats put into the list `made`. Eager mode alone; without setup_context, which binds arguments by name at each call.
    """

    @staticmethod
    def forward(
        ctx: Any, spec: FlowSpec, weights: Tensor, dtype: torch.dtype, made: list[Tensor], *features: Tensor
    ) -> Tensor:
        stats, signs = _forward(spec, features)
        made.append(stats)
        ctx.weights = weights
        _save(ctx, spec, features, signs)
        return (stats * weights).sum().to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        grads = _feature_gradients(ctx, ctx.needs_input_grad[4:], ctx.weights * grad_loss)
        return (None, None, None, None, *grads)


class _RefusedTwice(torch.autograd.Function):
    """The backward pass as a node of its own under torch.func: right once, an error when differentiated again."""

    @staticmethod
    def forward(
        spec: FlowSpec, layouts: Any, wanted: Any, grad_stats: Tensor, *saved: Tensor
    ) -> tuple[Tensor, ...]:
        return _flow_gradients(spec, layouts, wanted, grad_stats, saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(DOUBLE_BACKWARD)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(VMAP)


def _flow_gradients(
    spec: FlowSpec,
    layouts: tuple[Layout, ...],
    wanted: tuple[bool, ...],
    grad_stats: Tensor,
    saved: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """One gradient for each wanted feature, in the feature's dtype and strides."""
    device = grad_stats.device
    squared, leading, backend = spec.sums
    stages = spec.by_stage(layouts)
    made = [lay for stage in stages for lay in kernel_layouts(stage, leading)]
    arguments = (
        [f for stage in spec.by_stage(saved) for f in align(stage, leading)] if squared else [],
        torch.empty(0, dtype=torch.uint8, device=device) if squared else saved[0],
        grad_stats.contiguous(),  # .sum() and .mean() send stride 0
        spec.lengths,
        [stage[0].shape.numel() for stage in stages],
        spec.groups(stages),
        squared,
    )
    if torch.compiler.is_compiling():
        described = [lay for lay, want in zip(made, wanted, strict=True) if want]
        grads = compiled.flow_gradients(
            *arguments,
            wanted,
            [len(lay.shape) for lay in described],
            [size for lay in described for size in lay.shape],
            [stride for lay in described for stride in lay.strides],
            [compiled.DTYPES.index(lay.dtype) for lay in described],
            backend,
        )
    else:
        nothing = grad_stats.new_empty(0)
        slots = [
            torch.empty_strided(lay.shape, lay.strides, dtype=lay.dtype, device=device) if want else nothing
            for lay, want in zip(made, wanted, strict=True)
        ]
        ops.flow_kernels(backend).backward(*arguments, slots)
        grads = [grad for grad, want in zip(slots, wanted, strict=True) if want]
    asked = [layout for layout, want in zip(layouts, wanted, strict=True) if want]
    # A list, not a generator, as in `align`.
    return tuple([with_layout(grad, layout) for grad, layout in zip(grads, asked, strict=True)])
