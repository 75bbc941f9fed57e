"""Mirrors: a chain run backwards with its weights transposed and biases of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .chains import (
    ACTIVATIONS,
    CONVOLUTIONS,
    TRANSPOSED,
    WEIGHTED,
    Chain,
    Layer,
    check_width,
    forward,
    widths,
)

_CONV: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_CONV_TRANSPOSE: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Mirror(nn.Module):
    """The mirror of a chain.

    For a layer ``h' = s(W h + c)`` it computes ``h = s_below(W^T h' + d)``, from the last layer of the chain to
    its first: ``s_below`` is the activation in front of the layer, and ``d``, zeros at first, is the mirror's
    own. The activation behind the chain's last layer is not undone. ``W^T`` of a convolution is the transposed
    convolution with the same weight, stride, padding, dilation and groups, its adjoint.

    Args:
        chain: with modules that have a mirror.
        free: whether the mirror has weights of its own, copies of the chain's to begin with, instead of the
            chain's.
        activate_front: whether the activation in front of the chain's first layer ends the mirror.
    """

    def __init__(self, chain: Chain, *, free: bool, activate_front: bool) -> None:
        super().__init__()
        # A tuple of dataclasses, so that the model's modules do not become this one's.
        self._chain = chain
        self._activate_front = activate_front
        self._check_reshapes()
        weights = [_weight(layer) for layer in chain.weighted]
        self.biases = nn.ParameterList(
            weight.detach().new_zeros(widths(layer.module)[0])
            for layer, weight in zip(chain.weighted, weights, strict=True)
        )
        self.weights = nn.ParameterList(weight.detach().clone() for weight in weights) if free else None

    def _check_reshapes(self) -> None:
        """Behind a layer of ``last`` nothing tells the shape that a Flatten was given."""
        chain = self._chain
        for layer in chain.layers[chain.lead :] if chain.argument == "last" else ():
            if isinstance(layer.module, nn.Flatten):
                raise ValueError(
                    f"last: {layer} cannot be mirrored, because y does not tell the shape in front of it; let "
                    "last begin behind it, or pass mirror=<your module>"
                )

    def forward(self, hidden: Tensor, called: str, shapes: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        """``shapes``: what each module of the chain was given; None where nobody knows."""
        number = len(self._chain.weighted)
        for index in reversed(range(len(self._chain.layers))):
            layer = self._chain.layers[index]
            shape = None if shapes is None else shapes[index]
            if isinstance(layer.module, WEIGHTED):
                number -= 1
                check_width(layer, hidden, called, taken=False)
                hidden = self._transposed(layer, number, hidden, shape)
            elif isinstance(layer.module, ACTIVATIONS):
                if number < len(self._chain.weighted) and (number > 0 or self._activate_front):
                    hidden = forward(layer.module, hidden)
            elif isinstance(layer.module, nn.Unflatten):
                hidden = _flatten(layer.module, hidden)
            elif isinstance(layer.module, nn.Flatten) and shape is not None:
                hidden = hidden.reshape(shape)
        return hidden

    def _transposed(self, layer: Layer, number: int, hidden: Tensor, shape: tuple[int, ...] | None) -> Tensor:
        weight = _weight(layer) if self.weights is None else self.weights[number]
        bias = self.biases[number]
        if bias.shape[0] != widths(layer.module)[0] or weight.shape != _weight(layer).shape:
            raise RuntimeError(
                f"{layer} has another shape than when the mirror was made; make a new StructuredOutput"
            )
        return transposed(layer.module, hidden, weight, bias, None if shape is None else shape[2:])


def transposed(
    module: nn.Module, hidden: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int] | None = None
) -> Tensor:
    """``W^T hidden + bias`` for a layer ``module`` that computes ``W h + c`` with ``weight``.

    ``size``: the spatial size of the layer's input. A strided convolution gives one size for several; without
    ``size`` it is the stride times the output's where that is one of them, else the smallest.
    """
    if isinstance(module, nn.Linear):
        return F.linear(hidden, weight.t(), bias)
    if isinstance(module, TRANSPOSED):
        conv = _CONV[weight.dim() - 3]
        stride, padding, dilation = module.stride, module.padding, module.dilation
        return _first(conv(hidden, weight, bias, stride, padding, dilation, module.groups), size)
    assert isinstance(module, CONVOLUTIONS)
    padding = _padding(module)
    natural = _smallest(module, padding, hidden.shape[2:])
    if size is None:
        size = [
            step * n if least <= step * n < least + step else least
            for step, n, least in zip(module.stride, hidden.shape[2:], natural, strict=True)
        ]
    extra = [max(0, wanted - least) for wanted, least in zip(size, natural, strict=True)]
    conv_transpose = _CONV_TRANSPOSE[weight.dim() - 3]
    full = conv_transpose(hidden, weight, bias, module.stride, padding, extra, module.groups, module.dilation)
    return _first(full, size)


def _padding(module: Any) -> tuple[int, ...]:
    """In front of every dimension. With ``"same"`` and an even span one more is behind, which is cut off."""
    if module.padding == "valid":
        return (0,) * len(module.stride)
    if module.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
    padding: tuple[int, ...] = module.padding
    return padding


def _smallest(module: Any, padding: Sequence[int], size: Sequence[int]) -> list[int]:
    """The smallest input that gives an output of such a size."""
    settings = zip(module.stride, padding, module.dilation, module.kernel_size, size, strict=True)
    return [(n - 1) * s - 2 * p + d * (k - 1) + 1 for s, p, d, k, n in settings]


def _first(hidden: Tensor, size: Sequence[int] | None) -> Tensor:
    for axis, wanted in enumerate(size or (), start=2):
        if hidden.shape[axis] > wanted:
            hidden = hidden.narrow(axis, 0, wanted)
    return hidden


def _flatten(module: nn.Unflatten, hidden: Tensor) -> Tensor:
    sizes: Any = module.unflattened_size
    dim: Any = module.dim
    if not isinstance(dim, int):
        raise ValueError("nn.Unflatten with a named dimension cannot be mirrored; pass mirror=<your module>")
    start = dim if dim >= 0 else hidden.dim() + dim + 1 - len(sizes)
    return hidden.flatten(start, start + len(sizes) - 1)


def _weight(layer: Layer) -> Tensor:
    weight: Any = layer.module.weight
    tensor: Tensor = weight
    return tensor
