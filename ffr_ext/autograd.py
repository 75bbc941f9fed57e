"""The autograd node of the loss: what is saved, what is refused.

`FlowStats` maps the features of a network to the sums of its difference norms (`stats`, design.md section 5). What the
loss makes of them (roots, angles, weights, means) is ordinary differentiable arithmetic on that tiny tensor.

Saved for backward: for l1 the packed signs only (0.5 byte an element), for the other norms the features
themselves, which autograd keeps without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import compiled, ops
from ._torch import transforms_active
from .reference import at_positions
from .stages import Layout, Stage, Sums, align, kernel_layouts, with_layout

DOUBLE_BACKWARD = (
    "ffr_ext: the gradient of the feature-flow loss was asked for with create_graph=True, but its second "
    "derivative is not implemented. Compute the loss with backend='reference' to differentiate twice."
)
VMAP = (
    "ffr_ext: the fused feature-flow kernels do not support torch.vmap. Loop over the samples, or compute the "
    "loss with backend='reference'."
)


Item = TypeVar("Item", Tensor, Layout)


class FlowSpec(NamedTuple):
    """The settings of one node that follow from the stages and are not tensors: for each stage how many features,
    elements of a feature and groups of sums it has."""

    sums: Sums
    lengths: tuple[int, ...]
    numels: tuple[int, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, stages: Sequence[Stage], sums: Sums) -> FlowSpec:
        lengths, numels, groups = zip(
            *[(stage.length, stage.numel, stage.groups(sums.leading)) for stage in stages], strict=True
        )
        return cls(sums, lengths, numels, groups)

    def by_stage(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """Cut a flat sequence into one slice per stage."""
        slices, first = [], 0
        for length in self.lengths:
            slices.append(items[first : first + length])
            first += length
        return slices

    def align(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features as the kernels walk them."""
        if all([f.is_contiguous() for f in features]):  # noqa: C419  as in `stages.align`
            return list(features)
        return [f for stage in self.by_stage(features) for f in align(stage, self.sums.leading)]


def _forward(spec: FlowSpec, save_signs: bool, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The forward pass: (stats, signs)."""
    (squared, _leading, backend), lengths, _numels, groups = spec
    features = spec.align(features)
    if torch.compiler.is_compiling():
        return compiled.flow_stats(features, lengths, groups, squared, save_signs, backend)
    stats, signs = compiled.empty_stats(features, lengths, groups, save_signs)
    ops.flow_kernels(backend).forward(features, lengths, groups, squared, stats, signs)
    return stats, signs


def _save(
    ctx: Any, spec: FlowSpec, features: Sequence[Tensor], signs: Tensor, padding: Tensor | None
) -> None:
    ctx.set_materialize_grads(False)
    ctx.spec = spec
    # Shapes and strides instead of the features: l1 needs nothing else of them.
    ctx.layouts = tuple([Layout.of(f) for f in features])
    ctx.save_for_backward(padding, *(features if spec.sums.squared else (signs,)))


def _feature_gradients(ctx: Any, wanted: tuple[bool, ...], coef: Tensor) -> list[Tensor | None]:
    """The backward pass, one entry per feature, from d loss / d stats."""
    call = ctx.spec, ctx.layouts, wanted, coef
    if not torch.is_grad_enabled():
        grads = iter(_flow_gradients(*call, *ctx.saved_tensors))
    elif transforms_active():
        # torch.func.grad always records its backward pass; only differentiating that record is refused.
        grads = iter(_RefusedTwice.apply(*call, *ctx.saved_tensors))
    else:
        raise RuntimeError(DOUBLE_BACKWARD)
    return [next(grads) if want else None for want in wanted]


class FlowStats(torch.autograd.Function):
    """`FlowStats.apply(spec, save_signs, padding, *features) -> (stats, signs)`; differentiable in the features, once.

    Where `padding` is True gradients are 0, whatever is there: 0 times the difference of what is not finite is NaN.
    """

    @staticmethod
    def forward(
        spec: FlowSpec, save_signs: bool, padding: Tensor | None, *features: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _forward(spec, save_signs, features)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        spec, _save_signs, padding, *features = inputs
        _stats, signs = output
        ctx.mark_non_differentiable(signs)
        _save(ctx, spec, features, signs, padding)

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, _signs: None) -> tuple[Tensor | None, ...]:
        if grad_stats is None:
            return (None,) * len(ctx.needs_input_grad)
        return (None, None, None, *_feature_gradients(ctx, ctx.needs_input_grad[3:], grad_stats))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(VMAP)


class FlowProduct(torch.autograd.Function):
    """`FlowProduct.apply(spec, save_signs, weights, dtype, made, *features)`: `(stats * weights).sum().to(dtype)` in
    one node, with stats put into the list `made`. Eager mode alone; without setup_context, for which the arguments are
    bound by name at each call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: FlowSpec,
        save_signs: bool,
        weights: Tensor,
        dtype: torch.dtype,
        made: list[Tensor],
        *features: Tensor,
    ) -> Tensor:
        stats, signs = _forward(spec, save_signs, features)
        made.append(stats)
        ctx.weights = weights
        _save(ctx, spec, features, signs, None)
        return (stats * weights).sum().to(dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        grads = _feature_gradients(ctx, ctx.needs_input_grad[5:], ctx.weights * grad_loss)
        return (None, None, None, None, None, *grads)


class _RefusedTwice(torch.autograd.Function):
    """The backward pass as a node of its own under torch.func: right once, an error when differentiated again."""

    @staticmethod
    def forward(
        spec: FlowSpec, layouts: Any, wanted: Any, grad_stats: Tensor, padding: Tensor | None, *saved: Tensor
    ) -> tuple[Tensor, ...]:
        return _flow_gradients(spec, layouts, wanted, grad_stats, padding, *saved)

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
    padding: Tensor | None,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    """One gradient for each wanted feature, in the feature's dtype and strides."""
    device = grad_stats.device
    (squared, leading, backend), lengths, numels, groups = spec
    made: Sequence[Layout] = layouts
    if not all([lay.contiguous for lay in layouts]):  # noqa: C419  as in `stages.align`
        made = [lay for stage in spec.by_stage(layouts) for lay in kernel_layouts(stage, leading)]
    arguments = (
        spec.align(saved) if squared else [],
        torch.empty(0, dtype=torch.uint8, device=device) if squared else saved[0],
        grad_stats.contiguous(),  # .sum() and .mean() send stride 0
        lengths,
        numels,
        groups,
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
    if padding is not None:
        grads = [grad.masked_fill_(at_positions(padding, grad.dim()), 0) for grad in grads]
    if made is layouts:
        return tuple(grads)
    asked = [layout for layout, want in zip(layouts, wanted, strict=True) if want]
    # A list, not a generator, as in `align`.
    return tuple([with_layout(grad, layout) for grad, layout in zip(grads, asked, strict=True)])
