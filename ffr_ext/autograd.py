"""The autograd node of the loss: what is saved, what is refused.

`FlowStats` maps the features of a network to the sums of its difference norms (`stats`, design.md section 5). What the
loss makes of them (roots, angles, weights, means) is ordinary differentiable arithmetic on that tiny tensor.

Saved for backward: for l1 the packed signs only (0.5 byte an element), for the other norms the features
themselves, which autograd keeps without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import compiled, ops
from ._torch import transforms_active
from .stages import Layout, align, kernel_layouts

DOUBLE_BACKWARD = (
    "ffr_ext: the gradient of the feature-flow loss was asked for with create_graph=True, but its second "
    "derivative is not implemented. Compute the loss with backend='reference' to differentiate twice."
)
VMAP = (
    "ffr_ext: the fused feature-flow kernels do not support torch.vmap. Loop over the samples, or compute the "
    "loss with backend='reference'."
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


def _sums(spec: FlowSpec, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The forward pass: (stats, signs)."""
    stages = _by_stage(features, spec.lengths)
    groups = [stage[0].shape[0] if spec.per_sample else 1 for stage in stages]
    aligned = [f for stage in stages for f in align(stage, spec.per_sample)]
    if torch.compiler.is_compiling():
        return compiled.flow_stats(aligned, spec.lengths, groups, spec.squared, spec.save_signs, spec.backend)
    stats, signs = compiled.empty_stats(aligned, spec.lengths, groups, spec.save_signs)
    ops.flow_kernels(spec.backend).forward(aligned, spec.lengths, groups, spec.squared, stats, signs)
    return stats, signs


def _save(ctx: Any, spec: FlowSpec, features: tuple[Tensor, ...], signs: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.spec = spec
    # Shapes and strides instead of the features: l1 needs nothing else of them.
    ctx.layouts = tuple(map(Layout.of, features))
    if spec.squared:
        ctx.save_for_backward(*features)
    else:
        ctx.save_for_backward(signs)


def _feature_gradients(ctx: Any, wanted: tuple[bool, ...], coef: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass, one entry per feature, from d loss / d stats."""
    if torch.is_grad_enabled():
        if not transforms_active():
            raise RuntimeError(DOUBLE_BACKWARD)
        # torch.func.grad always records its backward pass; only differentiating that record is refused.
        grads = _RefusedTwice.apply(ctx.spec, ctx.layouts, wanted, coef, *ctx.saved_tensors)
    else:
        grads = _flow_gradients(ctx.spec, ctx.layouts, wanted, coef, ctx.saved_tensors)
    by_feature = iter(grads)
    return tuple(next(by_feature) if want else None for want in wanted)


class FlowStats(torch.autograd.Function):
    """`FlowStats.apply(spec, *features) -> (stats, signs)`; differentiable in the features, once. For torch.func and
    torch.compile."""

    @staticmethod
    def forward(spec: FlowSpec, *features: Tensor) -> tuple[Tensor, Tensor]:
        return _sums(spec, features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        spec, *features = inputs
        _stats, signs = output
        ctx.mark_non_differentiable(signs)
        _save(ctx, spec, tuple(features), signs)

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, _signs: None) -> tuple[Tensor | None, ...]:
        if grad_stats is None:
            return (None,) * len(ctx.needs_input_grad)
        return (None, *_feature_gradients(ctx, tuple(ctx.needs_input_grad[1:]), grad_stats))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(VMAP)


class _EagerFlowStats(torch.autograd.Function):
    """`FlowStats` without setup_context: the arguments of one that has it are bound by name at every call
    (docs/performance.md, "Whole call", attempt 1)."""

    @staticmethod
    def forward(ctx: Any, spec: FlowSpec, *features: Tensor) -> tuple[Tensor, Tensor]:
        stats, signs = _sums(spec, features)
        ctx.mark_non_differentiable(signs)
        _save(ctx, spec, features, signs)
        return stats, signs

    backward = staticmethod(FlowStats.backward)


_apply_eagerly = super(torch.autograd.Function, _EagerFlowStats).apply  # nor torch's check for torch.func


def flow_stats(spec: FlowSpec, features: Sequence[Tensor]) -> Tensor:
    """The sums of the differences of `features`: the node for the way in which this is run."""
    if torch.compiler.is_compiling() or transforms_active():
        stats, _signs = FlowStats.apply(spec, *features)
    else:
        stats, _signs = _apply_eagerly(spec, *features)
    return stats


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
        grads = compiled.flow_gradients(
            *arguments,
            wanted,
            [len(lay.shape) for lay in described],
            [size for lay in described for size in lay.shape],
            [stride for lay in described for stride in lay.strides],
            [compiled.DTYPES.index(lay.dtype) for lay in described],
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
    # A list, not a generator, as in `align`.
    return tuple([_with_strides(grad, layout) for grad, layout in zip(grads, asked, strict=True)])


def _with_strides(grad: Tensor, layout: Layout) -> Tensor:
    """`grad` in the strides of its feature, where those are dense."""
    if grad.stride() == layout.strides or layout.storage_order is None:
        return grad
    return torch.empty_strided(layout.shape, layout.strides, dtype=grad.dtype, device=grad.device).copy_(grad)
