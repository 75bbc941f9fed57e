"""The autograd node of the loss: what is saved, what is refused.

`FlowStats` maps the features of a network to the sums of its difference norms (`stats`, design.md section 5). What the
loss makes of them (roots, angles, weights, means) is ordinary differentiable arithmetic on that tiny tensor.

Saved for backward: for l1 the packed signs only (0.5 byte an element), for the other norms the features
themselves, which autograd keeps without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import compiled, ops
from ._torch import transforms_active
from .reference import at_positions
from .stages import Layouts, Stage, Sums, with_strides

DOUBLE_BACKWARD = (
    "ffr_ext: the gradient of the feature-flow loss was asked for with create_graph=True, but its second "
    "derivative is not implemented. Compute the loss with backend='reference' to differentiate twice."
)
VMAP = (
    "ffr_ext: the fused feature-flow kernels do not support torch.vmap. Loop over the samples, or compute the "
    "loss with backend='reference'."
)


class FlowSpec(NamedTuple):
    """The settings of one node that follow from the stages and are not tensors."""

    sums: Sums
    lengths: tuple[int, ...]  # of each stage how many features it has,
    numels: tuple[int, ...]  # how many elements each of them,
    groups: tuple[int, ...]  # and how many groups of sums
    entries: int  # of stats
    packed: int  # bytes of signs

    @classmethod
    def of(cls, stages: Sequence[Stage], sums: Sums) -> FlowSpec:
        lengths, numels, groups = zip(
            *[(stage.length, stage.numel, stage.groups(sums.leading)) for stage in stages], strict=True
        )
        return cls(sums, lengths, numels, groups, *compiled.sizes(lengths, numels, groups))

    def empty_stats(self, device: torch.device, save_signs: bool) -> tuple[Tensor, Tensor]:
        """What the forward kernel fills: stats, and the packed signs if wanted."""
        return compiled.empty_stats(self.entries, self.packed if save_signs else 0, device)

    def layouts(self, features: Sequence[Tensor]) -> Layouts:
        return Layouts.of(features, self.lengths, self.sums.leading)


def _forward(
    spec: FlowSpec, save_signs: bool, features: Sequence[Tensor], layouts: Layouts
) -> tuple[Tensor, Tensor]:
    """The forward pass: (stats, signs)."""
    (squared, _leading, backend), lengths, _numels, groups, *_ = spec
    features = layouts.align(features)
    if torch.compiler.is_compiling():
        return compiled.flow_stats(features, lengths, groups, squared, save_signs, backend)
    stats, signs = spec.empty_stats(features[0].device, save_signs)
    ops.flow_kernels(backend).forward(features, lengths, groups, squared, stats, signs)
    return stats, signs


def _save(
    ctx: Any,
    spec: FlowSpec,
    layouts: Layouts,
    features: Sequence[Tensor],
    signs: Tensor,
    padding: Tensor | None,
) -> None:
    ctx.set_materialize_grads(False)
    ctx.spec = spec
    # Shapes and strides instead of the features: l1 needs nothing else of them.
    ctx.layouts = layouts
    ctx.save_for_backward(padding, *(features if spec.sums.squared else (signs,)))


def _feature_gradients(
    ctx: Any, wanted: tuple[bool, ...], coef: Tensor, upstream: Tensor | None = None
) -> list[Tensor | None]:
    """The backward pass, one entry per feature, from d loss / d stats: `coef`, times the number `upstream`."""
    call = ctx.spec, ctx.layouts, wanted, coef, upstream
    if not torch.is_grad_enabled():
        grads = _flow_gradients(*call, *ctx.saved_tensors)
    elif transforms_active():
        # torch.func.grad always records its backward pass; only differentiating that record is refused.
        grads = _RefusedTwice.apply(*call, *ctx.saved_tensors)
    else:
        raise RuntimeError(DOUBLE_BACKWARD)
    return list(grads) if False not in wanted else compiled.by_feature(grads, wanted, None)


class FlowStats(torch.autograd.Function):
    """`FlowStats.apply(spec, save_signs, padding, *features) -> (stats, signs)`; differentiable in the features, once.

    Where `padding` is True gradients are 0, whatever is there: 0 times the difference of what is not finite is NaN.
    """

    @staticmethod
    def forward(
        spec: FlowSpec, save_signs: bool, padding: Tensor | None, *features: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _forward(spec, save_signs, features, spec.layouts(features))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        spec, _save_signs, padding, *features = inputs
        _stats, signs = output
        ctx.mark_non_differentiable(signs)
        _save(ctx, spec, spec.layouts(features), features, signs, padding)

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, _signs: None) -> tuple[Tensor | None, ...]:
        if grad_stats is None:
            return (None,) * len(ctx.needs_input_grad)
        # .sum() and .mean() send stride 0.
        return (None, None, None, *_feature_gradients(ctx, ctx.needs_input_grad[3:], grad_stats.contiguous()))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(VMAP)


def _product(entries: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    # Operators and not Python's floats, though those are faster on a CPU: tracers see operators alone.
    return (entries * weights).sum().to(dtype)


@dataclass(slots=True)
class FlowCall:
    """One call of `FlowProduct`: what is no feature, as one argument, since torch looks at each."""

    spec: FlowSpec
    save_signs: bool
    weights: Tensor | None = None
    dtype: torch.dtype = torch.float64  # of the loss
    padding: Tensor | None = None  # as for `FlowStats`
    stats: Tensor | None = None  # made by the forward pass


class FlowProduct(torch.autograd.Function):
    """`FlowProduct.apply(call, *features)`: `(entries * weights).sum().to(dtype)` in one node, where entries are the
    sums, or the roots of those of single samples; without weights the sums themselves, as of `FlowStats`. Eager mode
    alone; without setup_context, for which the arguments are bound by name at each call.
    """

    @staticmethod
    def forward(ctx: Any, call: FlowCall, *features: Tensor) -> Tensor:
        spec, weights = call.spec, call.weights
        layouts = spec.layouts(features)
        ctx.weights, ctx.roots = weights, None
        if weights is None:
            loss, signs = _forward(spec, call.save_signs, features, layouts)
        elif spec.sums.leading:
            call.stats, signs = _forward(spec, call.save_signs, features, layouts)
            ctx.roots = call.stats.sqrt()
            loss = _product(ctx.roots, weights, call.dtype)
        else:  # two operators instead of seven
            (squared, _leading, backend), lengths, _numels, groups, *_ = spec
            call.stats, signs = spec.empty_stats(weights.device, call.save_signs)
            loss = torch.empty((), dtype=call.dtype, device=weights.device)
            ops.flow_kernels(backend).forward(
                layouts.align(features), lengths, groups, squared, call.stats, signs, weights, loss
            )
        _save(ctx, spec, layouts, features, signs, call.padding)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[1:]
        if ctx.weights is None:
            return (None, *_feature_gradients(ctx, wanted, grad_loss.contiguous()))
        if ctx.roots is None:
            return (None, *_feature_gradients(ctx, wanted, ctx.weights, grad_loss))
        coef = torch.where(ctx.roots == 0.0, 0.0, ctx.weights * grad_loss / (2.0 * ctx.roots))
        return (None, *_feature_gradients(ctx, wanted, coef))


class Product(torch.autograd.Function):
    """`Product.apply(entries, weights, dtype)`: `(entries * weights).sum().to(dtype)` in one node instead of three."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.weights = weights
        return _product(entries, weights, dtype)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        return ctx.weights * grad_loss, None, None


class _RefusedTwice(torch.autograd.Function):
    """The backward pass as a node of its own under torch.func: right once, an error when differentiated again."""

    @staticmethod
    def forward(
        spec: FlowSpec,
        layouts: Any,
        wanted: Any,
        coef: Tensor,
        upstream: Tensor | None,
        padding: Tensor | None,
        *saved: Tensor,
    ) -> tuple[Tensor, ...]:
        return _flow_gradients(spec, layouts, wanted, coef, upstream, padding, *saved)

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
    layouts: Layouts,
    wanted: tuple[bool, ...],
    coef: Tensor,
    upstream: Tensor | None,
    padding: Tensor | None,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    """One gradient for each wanted feature, in the feature's dtype and strides, from the contiguous `coef`."""
    device = coef.device
    (squared, _leading, backend), lengths, numels, groups, *_ = spec
    arguments = (
        layouts.align(saved) if squared else [],
        torch.empty(0, dtype=torch.uint8, device=device) if squared else saved[0],
        coef,
        lengths,
        numels,
        groups,
        squared,
    )
    given = list(zip(*layouts, strict=True))
    whole = False not in wanted
    if not whole:
        given = [layout for layout, want in zip(given, wanted, strict=True) if want]
    if torch.compiler.is_compiling():
        if upstream is not None:
            arguments = (*arguments[:2], coef * upstream, *arguments[3:])
        grads = compiled.flow_gradients(
            *arguments,
            wanted,
            [len(shape) for shape, *_ in given],
            [size for shape, *_ in given for size in shape],
            [stride for *_, walked in given for stride in walked],
            [compiled.DTYPES.index(dtype) for _, dtype, *_ in given],
            backend,
        )
    else:
        grads = [
            torch.empty_strided(shape, walked, dtype=dtype, device=device)
            for shape, dtype, _, walked in given
        ]
        slots = grads if whole else compiled.by_feature(grads, wanted, coef.new_empty(0))
        ops.flow_kernels(backend).backward(*arguments, slots, upstream)
    if padding is not None:
        grads = [grad.masked_fill_(at_positions(padding, grad.dim()), 0) for grad in grads]
    if layouts.walked == layouts.strides:
        return tuple(grads)
    # A list, not a generator, as in `walked_strides`.
    return tuple(
        [
            grad if lies == walked else with_strides(grad, lies)
            for grad, (_, _, lies, walked) in zip(grads, given, strict=True)
        ]
    )
