"""Receptive fields of any graph, measured: which pixels a unit depends on when nothing can hide a path."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .capture import Layers, channel_dim_of, check_model, chosen_layers

# A field of more than four times the image is the whole image to any reader, and large probes cost time.
_DOUBLINGS, _LARGEST_PROBE = 2, 1024


@dataclass(frozen=True)
class ReceptiveField:
    """Unit j along an axis sees the pixels [start + j stride, start + j stride + size), one number for each axis.

    ``whole``: the units see the whole image (squeeze and excitation, attention, global pooling), or more than can be
    probed; size is the image's, stride 0, start 0.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: tuple[int, ...]
    whole: bool = False

    def corner(self, unit: tuple[int, ...]) -> tuple[int, ...]:
        """The first pixel of a unit's field; negative where it begins in the padding."""
        return tuple(a + s * j for a, s, j in zip(self.start, self.stride, unit, strict=True))


def receptive_fields(
    model: nn.Module, x: Tensor, layers: Any = "auto", channel_dim: int | None = None
) -> dict[str, ReceptiveField]:
    """The receptive field of each layer's units, for images like ``x`` (B, C, ...).

    The model runs once more with all weights of convolutions and linear layers positive, norms and activations left
    out, and averages for maxima; the gradient of two neighbouring units then is nonzero exactly where they look.
    Larger images than ``x`` are tried for fields that reach its border. ``channel_dim`` as for `select_features`.
    """
    check_model(model, "receptive_fields")
    return fields_of(model, x, chosen_layers(model, layers), channel_dim)


def fields_of(
    model: nn.Module, x: Tensor, layers: Mapping[str, nn.Module], channel_dim: int | None
) -> dict[str, ReceptiveField]:
    """As `receptive_fields`, of modules by name."""
    own = size = tuple(int(s) for s in x.shape[2:])
    rank = len(own)
    fields = _probe(model, x, own, layers, channel_dim)
    for _ in range(_DOUBLINGS):
        size = tuple(2 * s for s in size)
        if not rank or None not in fields.values() or max(size) > _LARGEST_PROBE:
            break
        for name, field in _probe(model, x, size, layers, channel_dim).items():
            fields[name] = fields.get(name) or field
    whole = ReceptiveField(own, (0,) * rank, (0,) * rank, whole=True)
    return {name: field or whole for name, field in fields.items()}


class _Done(Exception):
    """All layers have run; what comes behind them need not."""


def _probe(
    model: nn.Module,
    x: Tensor,
    size: tuple[int, ...],
    layers: Mapping[str, nn.Module],
    channel_dim: int | None,
) -> dict[str, ReceptiveField | None]:
    """Fields on one image of ``size``; None where a field touches the border, so that it may be cut."""
    leaf = torch.ones(1, x.shape[1], *size, dtype=torch.float64, device=x.device, requires_grad=True)
    maps: dict[str, Tensor] = {}
    waiting = set(layers)

    def take(name: str, module: nn.Module, feature: Tensor) -> Tensor | None:
        maps[name] = feature.movedim(channel_dim_of(model, feature, channel_dim), 1)
        waiting.discard(name)
        if not waiting:
            raise _Done
        return feature.clone()

    with torch.enable_grad(), _Transparent(), Layers(model, layers, take) as run:
        try:
            run(leaf)
        except _Done:
            pass
        except Exception:
            # Not every model takes images of another size (a flat head, learned positions); what it did before
            # that still counts.
            if size == tuple(x.shape[2:]):
                raise
    return {name: _field(leaf, feature) for name, feature in maps.items()}


def _field(leaf: Tensor, feature: Tensor) -> ReceptiveField | None:
    if feature.dim() != leaf.dim() or not feature.requires_grad:
        return None  # its units have no places
    middle = [s // 2 for s in feature.shape[2:]]
    first, last = _extent(leaf, feature, middle)
    stride = []
    for axis, length in enumerate(feature.shape[2:]):
        if length < 2:
            return None
        step = 1 if middle[axis] + 1 < length else -1
        neighbour = list(middle)
        neighbour[axis] += step
        stride.append(step * (_extent(leaf, feature, neighbour)[0][axis] - first[axis]))
    if any(a <= 0 or b >= s - 1 for a, b, s in zip(first, last, leaf.shape[2:], strict=True)) or 0 in stride:
        return None
    size = tuple(b - a + 1 for a, b in zip(first, last, strict=True))
    start = tuple(a - s * m for a, s, m in zip(first, stride, middle, strict=True))
    return ReceptiveField(size, tuple(stride), start)


def _extent(leaf: Tensor, feature: Tensor, unit: list[int]) -> tuple[list[int], list[int]]:
    """First and last pixel along each axis that the unit depends on."""
    chosen = feature[0]
    for index in unit:
        chosen = chosen.select(1, index)
    chosen = chosen.sum()
    (signal,) = torch.autograd.grad(chosen, leaf, retain_graph=True)
    places = signal[0].ne(0).any(0).nonzero()
    if not len(places):
        return [0] * places.shape[1], [int(s) - 1 for s in leaf.shape[2:]]
    return places.amin(0).tolist(), places.amax(0).tolist()


class _Transparent(TorchFunctionMode):
    """A model of positive averages: every path passes, nothing cancels."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _IDENTITY:
            return args[0] if args else kwargs["input"]
        if func in _WEIGHTED:
            return _averaging(func, args, kwargs)
        if func in _MAXIMA:
            result = _MAXIMA[func](*args, **{k: v for k, v in kwargs.items() if k != "return_indices"})
            return (result, None) if kwargs.get("return_indices") else result
        return func(*args, **kwargs)


def _averaging(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The layer with equal weights that sum to 1 and no bias: nothing over- or underflows in deep models."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    x, weight, rest = given.pop("input"), given.pop("weight"), args[3:]
    given.pop("bias", None)
    ones = torch.full(weight.shape, 1 / max(math.prod(weight.shape[1:]), 1), dtype=x.dtype, device=x.device)
    return func(x, ones, None, *rest, **given)


def _pooled(rank: int) -> Any:
    """Max pooling's geometry as an average, dilation and ceil_mode too: a convolution of each channel with ones."""
    convolution = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]

    def each(value: Any) -> list[int]:
        return [int(value)] * rank if isinstance(value, int) else [int(v) for v in value]

    def pool(input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
             ceil_mode: bool = False) -> Tensor:  # fmt: skip
        kernel, pad, gap = each(kernel_size), each(padding), each(dilation)
        step = each(stride) if stride is not None and stride != [] else kernel
        spans = [g * (k - 1) + 1 for g, k in zip(gap, kernel, strict=True)]
        amounts: list[int] = []
        for length, span, p, s in reversed(list(zip(input.shape[-rank:], spans, pad, step, strict=True))):
            more = -(length + 2 * p - span) % s if ceil_mode else 0
            # torch drops a last window that would begin in the padding on the right
            outputs = (length + 2 * p + more - span) // s
            more = more if outputs * s < length + p else 0
            amounts += [p, p + more]
        channels = input.shape[-rank - 1]
        ones = torch.full(
            (channels, 1, *kernel), 1 / math.prod(kernel), dtype=input.dtype, device=input.device
        )
        return convolution(F.pad(input, amounts), ones, None, step, 0, gap, channels)

    return pool


def _callables(names: str, homes: tuple[Any, ...] = (torch, F, Tensor, torch.special)) -> set[Any]:
    spelled = [f"{name}{end}" for name in names.split() for end in ("", "_")]
    return {getattr(home, name) for home in homes for name in spelled if hasattr(home, name)}


_IDENTITY = _callables(
    "relu relu6 leaky_relu prelu rrelu elu celu selu silu gelu mish hardswish hardtanh threshold clamp clamp_min "
    "clamp_max clip sigmoid hardsigmoid logsigmoid tanh softsign tanhshrink softshrink hardshrink softplus expit "
    "batch_norm instance_norm group_norm layer_norm rms_norm local_response_norm "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
)
_WEIGHTED = {
    F.linear,
    *(getattr(F, f"{name}{rank}d") for name in ("conv", "conv_transpose") for rank in (1, 2, 3)),
}
_MAXIMA: dict[Any, Any] = {
    **{getattr(F, f"max_pool{rank}d"): _pooled(rank) for rank in (1, 2, 3)},
    **{getattr(torch, f"max_pool{rank}d"): _pooled(rank) for rank in (1, 2, 3)},
    **{
        getattr(F, f"adaptive_max_pool{rank}d"): getattr(F, f"adaptive_avg_pool{rank}d") for rank in (1, 2, 3)
    },
}
