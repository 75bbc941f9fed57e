"""The autograd node of the loss: what is saved, what is refused.

`FlowStats` maps the features of a network to the sums of its difference norms (`stats`, design.md section 5). What the
loss makes of them (roots, angles, weights, means) is ordinary differentiable arithmetic on that tiny tensor.

Saved for backward: for l1 the packed signs only (0.5 byte an element), for the other norms the features themselves, which
autograd keeps without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import ops, traced
from .stages import Layout, align, kernel_layouts

DOUBLE_BACKWARD = (
    "ffr_ext: the gradient of the feature-flow loss was asked for with create_graph=True, but its second derivative is "
    "not implemented. Compute the loss with backend='reference' to differentiate twice."
)
VMAP = (
    "ffr_ext: the fused feature-flow kernels do not support torch.vmap. Loop over the samples, or compute the loss with "
    "backend='reference'."
)


Item = TypeVar("Item")


@dataclass(frozen=True)
class FlowSpec:
    """The settings of one `FlowStats` node that are not tensors."""

    lengths: tuple[int, ...]  # features per stage
    squared: bool  # sums of squares; False: sums of absolute values
    per_sample: bool  # one entry per sample instead of one per term
    backend: str  # a concrete backend, not "auto"
    save_signs: bool  # a gradient of the absolute values will be wanted


def _by_stage(items: Sequence[Item], lengths: tuple[int, ...]) -> list[Sequence[Item]]:
    """Cut a flat sequence into one slice per stage."""
    slices, first = [], 0
    for length in lengths:
        slices.append(items[first : first + length])
        first += length
    return slices


class FlowStats(torch.autograd.Function):
    """`FlowStats.apply(spec, *features) -> (stats, signs)`; differentiable in the features, once."""

    @staticmethod
    def forward(spec: FlowSpec, *features: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        stages = _by_stage(features, spec.lengths)
        groups = [stage[0].shape[0] if spec.per_sample else 1 for stage in stages]
        aligned = [f for stage in stages for f in align(stage, spec.per_sample)]
        if torch.compiler.is_compiling():
            return traced.flow_stats(aligned, spec.lengths, groups, spec.squared, spec.save_signs, spec.backend)
        stats, signs = traced.empty_stats(aligned, spec.lengths, groups, spec.save_signs)
        ops.flow_kernels(spec.backend).forward(aligned, spec.lengths, groups, spec.squared, stats, signs)
        return stats, signs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        spec, *features = inputs
        signs = output[1]
        ctx.mark_non_differentiable(signs)
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        # Shapes and strides instead of the features: l1 needs nothing else of them.
        ctx.layouts = tuple(Layout.of(f) for f in features)
        if spec.squared:
            ctx.save_for_backward(*features)
        else:
            ctx.save_for_backward(signs)

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, _grad_signs: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_stats is None:
            return (None,) * (1 + len(ctx.layouts))
        wanted = tuple(ctx.needs_input_grad[1:])
        if torch.is_grad_enabled():
            if not _transforms_active():
                raise RuntimeError(DOUBLE_BACKWARD)
            # torch.func.grad always records its backward pass; only differentiating that record is refused.
            grads = _RefusedTwice.apply(ctx.spec, ctx.layouts, wanted, grad_stats, *ctx.saved_tensors)
        else:
            grads = _flow_gradients(ctx.spec, ctx.layouts, wanted, grad_stats, ctx.saved_tensors)
        by_feature = iter(grads)
        return (None, *(next(by_feature) if want else None for want in wanted))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(VMAP)


class _RefusedTwice(torch.autograd.Function):
    """The backward pass as a node of its own under torch.func: right once, an error when differentiated again."""

    @staticmethod
    def forward(spec: FlowSpec, layouts: Any, wanted: Any, grad_stats: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
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
    stages = _by_stage(layouts, spec.lengths)
    features: list[Tensor] = []
    signs = torch.empty(0, dtype=torch.uint8, device=device)
    if spec.squared:
        features = [f for stage in _by_stage(saved, spec.lengths) for f in align(stage, spec.per_sample)]
    else:
        (signs,) = saved
    made = [lay for stage in stages for lay in kernel_layouts(stage, spec.per_sample)]
    arguments = (
        features,
        signs,
        grad_stats.contiguous(),  # .sum() and .mean() send stride 0
        spec.lengths,
        [stage[0].shape.numel() for stage in stages],
        [stage[0].shape[0] if spec.per_sample else 1 for stage in stages],
        spec.squared,
    )
    if torch.compiler.is_compiling():
        described = [lay for lay, want in zip(made, wanted, strict=True) if want]
        grads = traced.flow_gradients(
            *arguments,
            wanted,
            [len(lay.shape) for lay in described],
            [size for lay in described for size in lay.shape],
            [stride for lay in described for stride in lay.strides],
            [lay.dtype for lay in described],
            spec.backend,
        )
    else:
        nothing = signs.new_empty(0)
        slots = [
            torch.empty_strided(lay.shape, lay.strides, dtype=lay.dtype, device=device) if want else nothing
            for lay, want in zip(made, wanted, strict=True)
        ]
        ops.flow_kernels(spec.backend).backward(*arguments, slots)
        grads = [grad for grad, want in zip(slots, wanted, strict=True) if want]
    asked = [layout for layout, want in zip(layouts, wanted, strict=True) if want]
    return tuple(_with_strides(grad, layout) for grad, layout in zip(grads, asked, strict=True))


def _with_strides(grad: Tensor, layout: Layout) -> Tensor:
    """`grad` in the strides of its feature, where those are dense."""
    if grad.stride() == layout.strides or layout.storage_order is None:
        return grad
    return torch.empty_strided(layout.shape, layout.strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def _transforms_active() -> bool:
    """Whether a torch.func transform is running. No public question exists; without the private one assume none."""
    ask = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(ask is not None and ask())
