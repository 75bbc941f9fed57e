"""`zero_small_filters`: filters that have all but vanished become exact zeros, which `compact` can take
out."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import nn

from .counting import check_threshold
from .scale import effective_scales, find_layers


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

    The effective scale is |gamma| sqrt(var / (var + eps)) behind a batch norm, else the filter's L2 norm; see
    `sparsity`. The filter and gamma become 0. What is left of the channel is the constant beta (the bias,
    without a norm), in training and in eval mode, which `compact` takes out where it can be absorbed.

    Args:
        model: Any module with convolutions or linear layers.
        threshold: At least 0. For a dry run also a sequence of thresholds.
        example_inputs: A tensor, a tuple or a dict. With them the batch norm behind each layer is found from
            the exported graph; without, from the order of the modules, and only where that leaves no doubt.
        dry_run: Change nothing and return the curve: one `CurvePoint` for each threshold, in rising order.

    Returns:
        One `ZeroedFilters` for each layer in which something changed; a second call returns an empty list.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if dry_run:
        thresholds = [threshold] if isinstance(threshold, int | float) else list(threshold)
        for value in thresholds:
            check_threshold(value)
        return [_point(model, value, example_inputs) for value in sorted(thresholds)]
    check_threshold(threshold)  # type: ignore[arg-type]  # a sequence is a TypeError here
    return _zero(model, threshold, example_inputs)  # type: ignore[arg-type]


def _zero(model: nn.Module, threshold: float, example_inputs: Any) -> list[ZeroedFilters]:
    zeroed = []
    layers = find_layers(model, example_inputs)
    with torch.no_grad():
        for layer, scales in zip(layers, effective_scales(layers), strict=True):
            small = scales <= threshold
            filters = layer.weight.movedim(layer.dim, 0)
            norm: Any = layer.norm
            gamma = None if norm is None else norm.weight
            changed = small & (filters != 0).flatten(1).any(1)
            if gamma is not None:
                changed |= small & (gamma != 0)
            if not bool(changed.any()):
                continue
            filters[changed] = 0  # a view of the weight: this writes to it
            if gamma is not None:
                gamma[changed] = 0
            indices = changed.nonzero().flatten()
            zeroed.append(
                ZeroedFilters(
                    layer.name, layer.norm_name, tuple(indices.tolist()), tuple(scales[indices].tolist())
                )
            )
    return zeroed


def _point(model: nn.Module, threshold: float, example_inputs: Any) -> CurvePoint:
    layers = find_layers(model, example_inputs)
    filters = sum(int((scales <= threshold).sum()) for scales in effective_scales(layers))
    if example_inputs is None:
        return CurvePoint(float(threshold), filters)
    from .checking import Check
    from .compaction import compact
    from .tracing import as_call

    args, kwargs = as_call(example_inputs)
    smaller = copy.deepcopy(model)
    _zero(smaller, threshold, example_inputs)
    report = compact(smaller, example_inputs, measure=False).report
    return CurvePoint(
        float(threshold),
        filters,
        report.parameters[1],
        report.flops[1],
        Check(model, args, kwargs).error(smaller),
    )
