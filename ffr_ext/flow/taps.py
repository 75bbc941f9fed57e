"""Gradients just in time: each feature's penalty gradient is made right before its layer's own backward.

A penalty that is one autograd node with L inputs writes all L gradients when the backward pass starts, and
they stay until each layer is reached: as much memory again as the features. Here a feature gets a node of its
own at the moment it is captured, a `Tap`, whose output is a 0-dim token; `Collect` runs the one-pass forward
kernel over all features and takes all tokens. Autograd runs nodes in the reverse order of their creation, so
tap l runs between the backward of layer l+1 and that of layer l.

Only the tokens are differentiable inputs of `Collect`; the features reach it by the side. What the taps need
(packed signs for l1, otherwise the features; and the coefficients) is saved by `Collect` as by any node, and
in its backward pass handed to the taps through the `Walk` they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._torch import graph_task, transforms_active
from ..autograd import DOUBLE_BACKWARD, FlowCall
from ..reference import at_positions
from ..stages import Layouts, Stage, stage_features, with_strides

_LOST = (
    "FeatureFlow: a captured feature was reached outside the backward pass of its loss. Two backward passes "
    "through one graph at the same time are not supported"
)


def can_tap(feature: Tensor) -> bool:
    """Whether a feature can get a tap, here and now, in eager mode: a compiled graph has one backward node for all its
    layers.

    Not under a torch.func transform, and not a tensor subclass.
    """
    return (
        feature.requires_grad
        and torch.is_grad_enabled()
        and type(feature) in (Tensor, torch.nn.Parameter)
        and not transforms_active()
    )


def tap(feature: Tensor) -> tuple[Slot, Tensor]:
    """A tap on `feature`: its slot and its token. Nothing is computed and nothing saved until `collect`."""
    slot = Slot(feature)
    return slot, Tap.apply(slot, feature)


class Slot:
    """A captured feature as its tap knows it: how it lies in memory, and where it stands in the walks."""

    def __init__(self, feature: Tensor) -> None:
        self.shape, self.dtype, self.strides = feature.shape, feature.dtype, feature.stride()
        self.places: list[tuple[Walk, int]] = []

    def gradient(self) -> Tensor | None:
        """The penalty's gradient of the feature, in the running backward pass; None if there is none."""
        total: Tensor | None = None
        for walk, place in self.places:
            live = walk.live
            if live is None or live.task != graph_task():
                raise RuntimeError(_LOST)
            if live.coef is None:
                continue  # this part of the loss was not differentiated
            layouts = walk.layouts
            shape, dtype, strides = layouts.shapes[place], layouts.dtypes[place], layouts.walked[place]
            mapped = walk.mapped[place]
            if total is not None and not mapped and (dtype, strides) == (total.dtype, total.stride()):
                live.write(place, total, accumulate=True)
                continue
            grad = torch.empty_strided(shape, strides, dtype=dtype, device=live.coef.device)
            live.write(place, grad, accumulate=False)
            if mapped or (dtype, strides) != (self.dtype, self.strides):
                grad = grad.to(self.dtype)
                if mapped:
                    grad = unpool(grad, self.shape)
                grad = with_strides(grad, self.strides)
            total = grad if total is None else total.add_(grad)
        return total


class _NotTraced(torch.autograd.Function):
    """A node that Dynamo runs and does not trace, as it does with those that have a `jvp`. After a graph break in a
    hook it comes by here, and would take the backward pass of a tap for what it is before `collect`: no gradient.
    """

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            "FeatureFlow: the loss has no forward-mode derivative; backend='reference' has one"
        )


class Tap(_NotTraced):
    """`Tap.apply(slot, feature) -> token`. Saves no tensor, so recomputation (checkpointing) fits."""

    @staticmethod
    def forward(ctx: Any, slot: Slot, feature: Tensor) -> Tensor:
        ctx.slot = slot
        ctx.set_materialize_grads(False)
        return torch.empty((), dtype=torch.float32, device=feature.device)

    @staticmethod
    def backward(ctx: Any, _grad_token: Tensor | None) -> tuple[None, Tensor | None]:
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        return None, ctx.slot.gradient()


class Collect(_NotTraced):
    """`Collect.apply(walk, features, slots, *tokens)`: what the walk's call asks for, differentiable through the slots'
    taps.
    """

    @staticmethod
    def forward(
        ctx: Any, walk: Walk, features: list[Tensor], slots: Sequence[Slot | None], *tokens: Tensor
    ) -> Tensor:
        ctx.walk = walk
        ctx.tokens = len(tokens)
        ctx.set_materialize_grads(False)
        result, saved = walk.run(features, slots, save=bool(tokens))
        ctx.save_for_backward(*saved)
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        if upstream is None:
            ctx.walk.live = _Live(ctx.walk, None, ())
            return (None,) * (3 + ctx.tokens)
        ctx.walk.live = _Live(ctx.walk, ctx.walk.call.coefficients(upstream), ctx.saved_tensors)
        # Autograd makes a tap's stream wait for this one only if a tensor on the device flows between them.
        zero = torch.zeros((), device=upstream.device) if upstream.is_cuda else None
        return (None, None, None, *(zero,) * ctx.tokens)


def collect(
    slots: Sequence[Slot | None],
    tokens: Sequence[Tensor],
    features: list[Tensor],
    stages: Sequence[Stage],
    call: FlowCall,
) -> Tensor:
    """A `functional.Maker`: differentiable through the taps of the features."""
    return Collect.apply(Walk(stages, call), features, slots, *tokens)


class Walk:
    """One call of the forward kernel, over stages of one device. A place is an index into its features."""

    def __init__(self, stages: Sequence[Stage], call: FlowCall) -> None:
        self.stages = stages
        self.call = call
        self.spec = call.spec
        self.kernels = ops.FLOW_KERNELS[call.spec.sums.backend]
        self.stage_of: list[int] = []
        self.first: list[int] = []  # place of each stage's first walked feature
        self.mapped: list[bool] = []  # whether a place is a feature pooled from the earlier stage
        self.readers: list[int] = []  # taps that read the value at each place: those within two steps
        self.taps = 0
        self.live: _Live | None = None

    def run(
        self, features: list[Tensor], slots: Sequence[Slot | None], save: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """What the call asks for, and what to save: the packed signs, or the walked features."""
        walked: list[Tensor] = []
        for index, stage in enumerate(self.stages):
            self.first.append(len(walked))
            walked += stage_features(features, stage)
            self.stage_of += [index] * stage.length
            self.mapped += [True] * stage.tail + [False] * stage.own
        squared, leading, _backend = self.spec.sums
        self.layouts = Layouts.of(walked, self.spec.lengths, leading)
        self.call.save_signs = save and not squared
        result, signs = self.call.forward(walked, self.layouts)
        if not save:
            return result, []
        self._tell(slots)
        return result, walked if squared else [signs]

    def _tell(self, slots: Sequence[Slot | None]) -> None:
        """Tell the taps where their features are."""
        self.readers = [0] * len(self.stage_of)
        for stage, first in zip(self.stages, self.first, strict=True):
            begin = stage.first - stage.tail
            for place, slot in enumerate(slots[begin : stage.first + stage.own], first):
                if slot is not None:
                    slot.places.append((self, place))
                    self.taps += 1
                    for near in self.near(place) if self.spec.sums.squared else ():
                        self.readers[near] += 1

    def near(self, place: int) -> range:
        """The places whose values the gradient at `place` is made of."""
        index = self.stage_of[place]
        first = self.first[index]
        return range(max(place - 2, first), min(place + 3, first + self.spec.lengths[index]))


class _Live:
    """What the taps of a walk need during a backward pass; a value is let go when its last reader has run."""

    def __init__(self, walk: Walk, coef: Tensor | None, saved: Sequence[Tensor]) -> None:
        self.task = graph_task()
        self.walk = walk
        self.coef = coef
        self.values: list[Tensor | None] = list(saved) if walk.spec.sums.squared else []
        # Of every stage the slices of coef and of the packed signs (without signs: empty).
        self.parts: list[tuple[Tensor, Tensor]] = []
        if coef is not None:
            (squared, *_), lengths, numels, groups, *_ = walk.spec
            entries = [ops.stats_entries(n, g) for n, g in zip(lengths, groups, strict=True)]
            planes = [
                0 if squared else ops.sign_bytes(n, size) for n, size in zip(lengths, numels, strict=True)
            ]
            signs = coef.new_empty(0, dtype=torch.uint8) if squared else saved[0]
            self.parts = list(zip(coef.split(entries), signs.split(planes), strict=True))
        self.readers = list(walk.readers)
        self.taps = walk.taps
        self.stream = _stream(coef)

    def write(self, place: int, grad: Tensor, accumulate: bool) -> None:
        """Run the kernel for the feature at `place`."""
        walk = self.walk
        index = walk.stage_of[place]
        first = walk.first[index]
        (squared, *_), lengths, numels, groups, *_ = walk.spec
        coef, signs = self.parts[index]
        features: list[Tensor] = []
        if squared:
            features = [grad.new_empty(0)] * lengths[index]  # those that are not near are not read
            for near in walk.near(place):
                features[near - first] = self._value(near)
        if self.stream is not None:
            self._used_on_this_stream([coef, signs, *features])
        walk.kernels.backward_at(
            features,
            signs,
            coef,
            lengths[index],
            numels[index],
            groups[index],
            squared,
            place - first,
            grad,
            accumulate,
        )
        padding = walk.call.padding
        if padding is not None:
            if self.stream is not None:
                self._used_on_this_stream([padding])
            grad.masked_fill_(at_positions(padding, grad.dim()), 0)
        self._release(place)

    def _value(self, place: int) -> Tensor:
        """The feature at `place` as the kernel walks it; if that takes a copy, it is made once."""
        value = self.values[place]
        assert value is not None
        if value.stride() != self.walk.layouts.walked[place]:
            value = self.values[place] = value.contiguous()
        return value

    def _release(self, place: int) -> None:
        for near in self.walk.near(place) if self.walk.spec.sums.squared else ():
            self.readers[near] -= 1
            if self.readers[near] == 0:
                self.values[near] = None
        self.taps -= 1
        if self.taps == 0:
            self.walk.live = None

    def _used_on_this_stream(self, tensors: list[Tensor]) -> None:
        """Keep memory that another stream allocated until this stream has read it."""
        here = _stream(self.coef)
        if here != self.stream:
            for tensor in tensors:
                tensor.record_stream(here)


def _stream(tensor: Tensor | None) -> Any:
    return torch.cuda.current_stream(tensor.device) if tensor is not None and tensor.is_cuda else None


def unpool(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of `reference.pool_to`: from the pooled and padded shape back to `shape`."""
    count = 1
    if grad.dim() > 1:
        grad = grad.narrow(1, 0, shape[1])
    for axis in range(2, grad.dim()):
        ratio = shape[axis] // max(grad.shape[axis], 1)
        if ratio > 1:
            grad = grad.repeat_interleave(ratio, axis)
            count *= ratio
    return grad / count if count > 1 else grad
