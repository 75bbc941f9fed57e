"""The weights of the terms as the loss needs them: on the device, once for every entry of the kernels' sums."""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor

from . import weighted
from .checks import runs_eagerly
from .stages import Plan

Kept = TypeVar("Kept")


class _CapturingError(Exception):
    """A CUDA graph is being captured."""


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def entry_weights(
    plan: Plan,
    gradient: float | list[float],
    curvature: float | list[float],
    norm: str,
    reduction: str,
    device: torch.device,
) -> weighted.EntryWeights:
    """d loss / d entry for every entry of stats, kept for later calls unless a CUDA graph is being captured.

    What is made then has no values until the graph is replayed, and a copy from the host would be replayed from
    memory that is long free: the weights are filled in by kernels.
    """
    wanted = plan, _hashable(gradient), _hashable(curvature), norm, reduction
    try:
        return _held(_entry_weights(*wanted, device), device)
    except _CapturingError:
        host = _make_entry_weights(*wanted, torch.device("cpu"))
        with torch.inference_mode(False), torch.no_grad():
            return weighted.EntryWeights.of(_filled(host.tolist(), host.dtype, device))


def weigh(name: str, weight: float | list[float] | Tensor, terms: Tensor) -> Tensor:
    """`(weight * terms).sum()`. A list is kept on the device for later calls; what `entry_weights` says of captures
    is true of it too. ValueError for a tensor without values, where the terms have some."""
    if isinstance(weight, list):
        weight = _on_device(weight, terms.dtype, terms.device)
    elif isinstance(weight, Tensor):
        if weight.device.type == "meta" != terms.device.type:
            raise ValueError(f"{name}: expected a tensor with values, got one on the device meta")
        weight = weight.to(terms.device)
    return (weight * terms).sum()


def _on_device(weights: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not runs_eagerly():
        return torch.tensor(weights, dtype=dtype, device=device)
    try:
        return _held(_list_on_device(tuple(weights), dtype, device), device)
    except _CapturingError:
        return _filled(weights, dtype, device)


@lru_cache(maxsize=256)
def _list_on_device(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if _capturing(device):
        raise _CapturingError
    with torch.inference_mode(False):
        return torch.tensor(weights, dtype=dtype, device=device)


_read_by_graphs: dict[int, object] = {}


def _held(weights: Kept, device: torch.device) -> Kept:
    """`weights`, for ever if a graph is being captured that reads them: the caches forget, a replay does not."""
    if _capturing(device):
        _read_by_graphs[id(weights)] = weights
    return weights


def _filled(values: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector made by kernels alone."""
    runs = [(value, len(list(run))) for value, run in groupby(values)] or [(0.0, 0)]
    return torch.cat([torch.full((n,), value, dtype=dtype, device=device) for value, n in runs])


def _hashable(weight: float | list[float]) -> float | tuple[float, ...]:
    return tuple(weight) if isinstance(weight, list) else weight


@lru_cache(maxsize=256)
def _entry_weights(
    plan: Plan,
    gradient: float | tuple[float, ...],
    curvature: float | tuple[float, ...],
    norm: str,
    reduction: str,
    device: torch.device,
) -> weighted.EntryWeights:
    if _capturing(device):
        raise _CapturingError  # which is not kept
    return weighted.EntryWeights.of(_make_entry_weights(plan, gradient, curvature, norm, reduction, device))


def _make_entry_weights(
    plan: Plan,
    gradient: float | tuple[float, ...],
    curvature: float | tuple[float, ...],
    norm: str,
    reduction: str,
    device: torch.device,
) -> Tensor:
    with (
        torch.inference_mode(False),
        torch.no_grad(),
    ):  # kept for later calls, which may want to differentiate
        if isinstance(gradient, float) and isinstance(curvature, float):
            # On the device already: weights that change at every step (a schedule) copy nothing from the host.
            unit_gradient = _unit_weights(plan, (1.0,) * plan.gradient_terms, (), norm, reduction, device)
            unit_curvature = _unit_weights(plan, (), (1.0,) * plan.curvature_terms, norm, reduction, device)
            return unit_gradient * gradient + unit_curvature * curvature
        on_gradient = gradient if isinstance(gradient, tuple) else (gradient,) * plan.gradient_terms
        on_curvature = curvature if isinstance(curvature, tuple) else (curvature,) * plan.curvature_terms
        return _unit_weights(plan, on_gradient, on_curvature, norm, reduction, device)


@lru_cache(maxsize=256)
def _unit_weights(
    plan: Plan,
    gradient: tuple[float, ...],
    curvature: tuple[float, ...],
    norm: str,
    reduction: str,
    device: torch.device,
) -> Tensor:
    """weight / divisor for every entry, one after another; 0 where no weight is given or the earlier stage has
    counted.
    """
    on_gradient, on_curvature = iter(gradient), iter(curvature)
    parts = []
    for stage in plan.stages:
        terms = [0.0] * stage.counted_by_earlier
        terms += [next(on_gradient, 0.0) for _ in range(stage.gradient_terms)]
        terms += [next(on_curvature, 0.0) for _ in range(stage.bends)]
        row = torch.tensor(terms, dtype=torch.float64, device="cpu") / stage.divisor(norm, reduction)
        parts.append(row.repeat_interleave(stage.batch) if norm == "l2" else row)
    return torch.cat(parts).to(device, non_blocking=True)
