"""The autograd nodes of the loss: what is saved, what is refused.

A `FlowCall` asks for the loss, or for the sums of the features' difference norms (`stats`, design.md section 5). The
node that gives it is `FlowProduct` in eager mode and `flow.taps.Collect` for `FeatureFlow`; `FlowStats` gives the sums
alone where something traces or transforms. What is made of sums (roots, angles, weights, means) is ordinary
differentiable arithmetic on that tiny tensor.

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


def _forward(
    spec: FlowSpec, save_signs: bool, features: Sequence[Tensor], layouts: Layouts
) -> tuple[Tensor, Tensor]:
    """The forward pass: (stats, signs)."""
    (squared, _leading, backend), lengths, _numels, groups, entries, packed = spec
    features = layouts.align(features)
    if torch.compiler.is_compiling():
        return compiled.flow_stats(features, lengths, groups, squared, save_signs, backend)
    stats, signs = compiled.empty_stats(entries, packed if save_signs else 0, features[0].device)
    ops.FLOW_KERNELS[backend].forward(features, lengths, groups, squared, stats, signs)
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


class FlowStats(torch.autograd.Function):
    """`FlowStats.apply(spec, save_signs, padding, *features) -> (stats, signs)`; differentiable in the features, once.

    Where `padding` is True gradients are 0, whatever is there: 0 times the difference of what is not finite is NaN.
    """

    @staticmethod
    def forward(
        spec: FlowSpec, save_signs: bool, padding: Tensor | None, *features: Tensor
    ) -> tuple[Tensor, Tensor]:
        layouts = Layouts.of(features, spec.lengths, spec.sums.leading)
        return _forward(spec, save_signs, features, layouts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        spec, _save_signs, padding, *features = inputs
        _stats, signs = output
        ctx.mark_non_differentiable(signs)
        layouts = Layouts.of(features, spec.lengths, spec.sums.leading)
        _save(ctx, spec, layouts, features, signs, padding)

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None, _signs: None) -> tuple[Tensor | None, ...]:
        if grad_stats is None:
            return (None,) * len(ctx.needs_input_grad)
        wanted = ctx.needs_input_grad[3:]
        coef = grad_stats.contiguous()  # .sum() and .mean() send stride 0
        tracing = torch.compiler.is_compiling()
        arguments = tracing, ctx.spec, ctx.layouts, wanted, coef, None, *ctx.saved_tensors
        if not torch.is_grad_enabled():
            grads = _flow_gradients(*arguments)
        elif transforms_active():
            # torch.func.grad always records its backward pass; only differentiating that record is refused.
            grads = _RefusedTwice.apply(*arguments)
        else:
            raise RuntimeError(DOUBLE_BACKWARD)
        return (None, None, None, *compiled.by_feature(grads, wanted, None))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> None:
        raise RuntimeError(VMAP)


@dataclass
class FlowCall:
    """What one call asks for that is no feature: the sums of `spec`, or with `weights` the loss,
    `(entries * weights).sum().to(dtype)`, where entries are the sums, or the roots of those of single samples."""

    spec: FlowSpec
    save_signs: bool = False
    weights: Tensor | None = None
    dtype: torch.dtype = torch.float64  # of the loss
    padding: Tensor | None = None  # as for `FlowStats`
    stats: Tensor | None = None  # of a loss: the sums it was made of
    roots: Tensor | None = None  # and their roots

    def forward(self, features: Sequence[Tensor], layouts: Layouts) -> tuple[Tensor, Tensor]:
        """What is asked for, and the signs. Eager mode alone."""
        spec, weights = self.spec, self.weights
        if weights is None:
            return _forward(spec, self.save_signs, features, layouts)
        if spec.sums.leading:
            self.stats, signs = _forward(spec, self.save_signs, features, layouts)
            self.roots = self.stats.sqrt()
            return weighted_sum(self.roots, weights, self.dtype), signs
        # Two operators instead of seven.
        (squared, _leading, backend), lengths, _numels, groups, entries, packed = spec
        self.stats, signs = compiled.empty_stats(entries, packed if self.save_signs else 0, weights.device)
        loss = torch.empty((), dtype=self.dtype, device=weights.device)
        aligned = features if layouts.as_they_lie else layouts.align(features)
        ops.FLOW_KERNELS[backend].forward(aligned, lengths, groups, squared, self.stats, signs, weights, loss)
        return loss, signs

    def coefficients(self, upstream: Tensor) -> Tensor:
        """d loss / d sums, contiguous, from the gradient of what `forward` gave."""
        if self.weights is None:
            return upstream.contiguous()  # .sum() and .mean() send stride 0
        if self.roots is None:
            return self.weights * upstream
        return torch.where(self.roots == 0.0, 0.0, self.weights * upstream / (2.0 * self.roots))


def weighted_sum(entries: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The loss from the entries that `FlowCall` describes."""
    # Operators and not Python's floats, though those are faster on a CPU: tracers see operators alone.
    return (entries * weights).sum().to(dtype)


class FlowProduct(torch.autograd.Function):
    """`FlowProduct.apply(call, *features)`: what `call` asks for, in one node. Eager mode alone; without setup_context,
    for which the arguments are bound by name at each call.
    """

    @staticmethod
    def forward(ctx: Any, call: FlowCall, *features: Tensor) -> Tensor:
        layouts = Layouts.of(features, call.spec.lengths, call.spec.sums.leading)
        result, signs = call.forward(features, layouts)
        ctx.call = call
        _save(ctx, call.spec, layouts, features, signs, call.padding)
        call.padding = None  # saved, and let go after the backward pass
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        call, wanted = ctx.call, ctx.needs_input_grad[1:]
        if call.weights is None or call.roots is not None:
            coef, factor = call.coefficients(upstream), None
        else:  # the kernel multiplies
            coef, factor = call.weights, upstream
        tracing = torch.compiler.is_dynamo_compiling()  # compiled autograd, the only tracer that gets here
        grads = _flow_gradients(tracing, call.spec, ctx.layouts, wanted, coef, factor, *ctx.saved_tensors)
        return (None, *(grads if False not in wanted else compiled.by_feature(grads, wanted, None)))


class _RefusedTwice(torch.autograd.Function):
    """The backward pass as a node of its own under torch.func: right once, an error when differentiated again."""

    @staticmethod
    def forward(
        tracing: bool,
        spec: FlowSpec,
        layouts: Any,
        wanted: Any,
        coef: Tensor,
        upstream: None,
        padding: Tensor | None,
        *saved: Tensor,
    ) -> tuple[Tensor, ...]:
        return _flow_gradients(tracing, spec, layouts, wanted, coef, upstream, padding, *saved)

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
    tracing: bool,
    spec: FlowSpec,
    layouts: Layouts,
    wanted: tuple[bool, ...],
    coef: Tensor,
    upstream: Tensor | None,
    padding: Tensor | None,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    """One gradient for each wanted feature, in the feature's dtype and strides, from the contiguous `coef`, times the
    number `upstream`."""
    device = coef.device
    (squared, _leading, backend), lengths, numels, groups, *_ = spec
    arguments = (
        (saved if layouts.as_they_lie else layouts.align(saved)) if squared else [],
        torch.empty(0, dtype=torch.uint8, device=device) if squared else saved[0],
        coef,
        lengths,
        numels,
        groups,
        squared,
    )
    given = list(zip(layouts.shapes, layouts.dtypes, layouts.strides, layouts.walked, strict=True))
    whole = False not in wanted
    if not whole:
        given = [layout for layout, want in zip(given, wanted, strict=True) if want]
    if tracing:
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
        ops.FLOW_KERNELS[backend].backward(*arguments, slots, upstream)
    if padding is not None:
        grads = [grad.masked_fill_(at_positions(padding, grad.dim()), 0) for grad in grads]
    if layouts.as_they_lie:
        return tuple(grads)
    # A list, not a generator, as in `walked_strides`.
    return tuple(
        [
            grad if lies == walked else with_strides(grad, lies)
            for grad, (_, _, lies, walked) in zip(grads, given, strict=True)
        ]
    )
