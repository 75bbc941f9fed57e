"""`zero_small_filters`: filters that have all but vanished become exact zeros, which `compact` can take
out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..models import as_call, check_dense_weights, deep_copy
from .compaction import compact
from .filters import Layer
from .scale import SmallFilters, effective_scales, find_layers, small_filters, without_repeats
from .sparsity import check_threshold
from .verify import Check


@dataclass(frozen=True)
class ZeroedFilters:
    """The filters of one layer that were zeroed.

    Attributes:
        layer: Path of the layer.
        norm: Path of the batch norm whose gamma was zeroed with them, or None.
        filters: Their indices.
        scales: The effective scale that each had.
    """

    layer: str
    norm: str | None
    filters: tuple[int, ...]
    scales: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.filters)


@dataclass(frozen=True)
class CurvePoint:
    """What zeroing at one threshold would give: filters at or below it, then parameters and FLOPs after
    `compact`, and the largest absolute change of an output on the example. The last three are None without
    example inputs."""

    threshold: float
    filters: int
    parameters: int | None = None
    flops: int | None = None
    error: float | None = None


@overload
def zero_small_filters(
    model: nn.Module, threshold: float, *, example_inputs: Any = None, dry_run: Literal[False] = False
) -> list[ZeroedFilters]: ...


@overload
def zero_small_filters(
    model: nn.Module,
    threshold: float | Sequence[float],
    *,
    example_inputs: Any = None,
    dry_run: Literal[True],
) -> list[CurvePoint]: ...


def zero_small_filters(
    model: nn.Module, threshold: float | Sequence[float], *, example_inputs: Any = None, dry_run: bool = False
) -> list[ZeroedFilters] | list[CurvePoint]:
    """Set every filter whose effective scale is at or below ``threshold`` to exact zeros, in place.

    The effective scale is ``|gamma| sqrt(var / (var + eps))`` behind a batch norm, else the filter's L2 norm; see
    `sparsity`. The filter and gamma become 0. What is left of the channel is the constant beta (the bias,
    without a norm), in training and in eval mode, which `compact` takes out where it can be absorbed. A filter of a
    weight that layers share becomes 0 where it is small in each of them; a gamma of one layer, by itself.

    Args:
        model: Any module with convolutions or linear layers.
        threshold: A finite number of at least 0. For a dry run also a sequence of thresholds.
        example_inputs: A tensor, a tuple or a dict. With them the batch norm behind each layer is found from
            the exported graph; without, from the order of the modules, and only where that leaves no doubt.
        dry_run: Change nothing and return the curve: one `CurvePoint` for each threshold, in rising order.

    Returns:
        One `ZeroedFilters` for each layer in which something changed; a second call returns an empty list. The
        filters of a weight that layers share are those of the first; another has the ones whose gamma, its own,
        was zeroed.

    Raises:
        TypeError: ``threshold`` is no number (in a dry run: nor a sequence of numbers).
        ValueError: ``threshold`` is negative or not finite; the weight of a filter to zero is computed (weight_norm,
            a pruning mask) and no parameter. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    check_dense_weights(model, "zero_small_filters")
    several = (
        isinstance(threshold, Iterable) and getattr(threshold, "ndim", None) != 0
    )  # a 0-dim tensor is a number
    if dry_run:
        thresholds: Any = threshold if several else [threshold]
        values = [check_threshold(value) for value in thresholds]
        return [_point(model, value, example_inputs) for value in sorted(values)]
    hint = "; several thresholds are for dry_run=True" if several and not isinstance(threshold, str) else ""
    return _zero(model, check_threshold(threshold, hint), example_inputs)


def _zero(model: nn.Module, threshold: float, example_inputs: Any) -> list[ZeroedFilters]:
    zeroed = []
    layers = find_layers(model, example_inputs)
    with torch.no_grad():
        found = []
        scales = effective_scales(layers)
        for layer, scale, small in zip(layers, scales, small_filters(layers, scales, threshold), strict=True):
            if bool(_to_change(layer, small).any()):
                _check_writable(layer)
                found.append((layer, scale, small))
        for layer, scale, small in found:
            changed = _to_change(layer, small)  # not what a tied weight has lost by now
            if not bool(changed.any()):
                continue
            layer.weight.movedim(layer.dim, 0)[small.rows] = 0  # a view of the weight: this writes to it
            if layer.gamma is not None:
                layer.gamma[small.gammas] = 0
            indices = changed.nonzero().flatten()
            zeroed.append(
                ZeroedFilters(
                    layer.name, layer.norm_name, tuple(indices.tolist()), tuple(scale[indices].tolist())
                )
            )
    return zeroed


def _to_change(layer: Layer, small: SmallFilters) -> Tensor:
    """Which of the small filters are not all zeros yet, with their gamma."""
    changed = small.rows & (layer.weight.movedim(layer.dim, 0) != 0).flatten(1).any(1)
    gamma = layer.gamma
    return changed if gamma is None else changed | (small.gammas & (gamma != 0))


def _check_writable(layer: Layer) -> None:
    """ValueError for a weight that is computed at every access or call: zeros written to it would be lost."""
    for path, module in ((layer.name, layer.module), (layer.norm_name, layer.norm)):
        if module is None or module.weight is None:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if "weight" not in dict(own):
            raise ValueError(
                f"model: {path}.weight is no parameter but computed (weight_norm, a parametrization, a pruning "
                "mask), so its filters cannot be zeroed; make it one first (remove_weight_norm, "
                "remove_parametrizations, prune.remove)"
            )


def _point(model: nn.Module, threshold: float, example_inputs: Any) -> CurvePoint:
    layers = find_layers(model, example_inputs)
    small = small_filters(layers, effective_scales(layers), threshold)
    filters = sum(int(mask.sum()) for mask in without_repeats(layers, [s.filters for s in small]))
    if example_inputs is None:
        return CurvePoint(threshold, filters)
    args, kwargs = as_call(example_inputs)
    smaller = deep_copy(model)
    _zero(smaller, threshold, example_inputs)
    report = compact(smaller, example_inputs, measure=False).report
    return CurvePoint(
        threshold,
        filters,
        report.parameters[1],
        report.flops[1],
        Check(model, args, kwargs).error(smaller),
    )
