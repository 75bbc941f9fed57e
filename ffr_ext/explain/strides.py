"""The backward pass of a strided convolution without the grid: resize the signal, then stride 1.

The transposed convolution of stride s lays kernels on a grid of step s. Where their overlaps differ, each input pixel
gets another share: for a 3x3 kernel and stride 2 the standard deviation over the four phases is 48 % of their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BACK = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_DEFAULTS = (None, None, None, 1, 0, 1, 1)

CONVOLUTIONS = {
    function
    for rank in _BACK
    for packet in (getattr(torch.ops.aten, f"conv{rank}d", None),)
    for function in (getattr(F, f"conv{rank}d"), packet, getattr(packet, "default", None))
    if function is not None
}


def _bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The seven arguments of ``F.conv1d``, ``2d`` and ``3d``, in their order."""
    given = dict(zip(_NAMES, args, strict=False)) | kwargs
    return [given.get(name, default) for name, default in zip(_NAMES, _DEFAULTS, strict=True)]


def _each(value: Any, rank: int) -> tuple[int, ...]:
    if isinstance(value, str):  # "valid"; torch refuses "same" with a stride
        return (0,) * rank
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(int(v) for v in value)
    return values * rank if len(values) == 1 else values


def is_strided(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    _, weight, _, stride, *_ = _bound(args, kwargs)
    return max(_each(stride, weight.dim() - 2)) > 1


def resized(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], align: str) -> Tensor:
    """The convolution, with the other backward pass."""
    x, weight, bias, stride, padding, dilation, groups = _bound(args, kwargs)
    if not x.requires_grad:
        return func(*args, **kwargs)  # nothing passes back through it
    rank = weight.dim() - 2
    weight, bias = (_for_explanations(tensor) for tensor in (weight, bias))
    geometry = (_each(stride, rank), _each(padding, rank), _each(dilation, rank), groups)
    return _Resized.apply(x, weight, bias, func, geometry, align)


def _for_explanations(parameter: Tensor | None) -> Tensor | None:
    if parameter is None or not parameter.requires_grad:
        return parameter
    return _NoGradient.apply(parameter)


def nearest(size: int, stride: int, resized: int, align: str) -> Tensor:
    """Which of ``size`` entries each of ``resized`` takes.

    Stride 1 would have given entry i s what entry i is now. "exact" gives each its s nearest (for odd s centred on
    i s, for even s one more in front); "floor" stretches, floor(j size / resized).
    """
    j = torch.arange(resized)
    if align == "floor":
        return j * size // resized
    return ((j + stride // 2) // stride).clamp(max=size - 1)


class _NoGradient(torch.autograd.Function):
    """A parameter; whoever asks for its gradient is told that there is none."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *signals: Any) -> Any:
        raise RuntimeError(
            "backward_rule(strides='resize') has no gradient for the weights of a strided convolution: it is for "
            "explanations. Ask for the input's, torch.autograd.grad(y, x), or pass strides='transpose'"
        )


class _Resized(torch.autograd.Function):
    """``func`` forward; back, the resized signal through the transposed convolution of stride 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        func: Callable[..., Any],
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
        align: str,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry, ctx.align, ctx.shape, ctx.dtype = geometry, align, x.shape, x.dtype
        stride, padding, dilation, groups = geometry
        return func(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *signals: Any) -> Any:
        (weight,) = ctx.saved_tensors
        signal = signals[0]
        stride, padding, dilation, groups = ctx.geometry
        rank = len(stride)
        for axis, s in enumerate(stride):
            kernel = dilation[axis] * (weight.shape[2 + axis] - 1)
            size = ctx.shape[axis - rank] + 2 * padding[axis] - kernel
            taken = nearest(signal.shape[axis - rank], s, size, ctx.align).to(signal.device)
            signal = signal.index_select(axis - rank + signal.dim(), taken)
        signal = signal / math.prod(stride)
        back = _BACK[rank](
            signal, weight.to(signal.dtype), None, 1, padding, 0, groups=groups, dilation=dilation
        )
        return back.to(ctx.dtype), None, None, None, None, None
