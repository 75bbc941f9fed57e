"""The terms of the penalty from the kernels' sums, and their weights, one for each of the sums on their device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .options import FlowOptions
from .stages import Plan, Stage, Sums

Rows = list[tuple[Tensor, Tensor]]  # per stage the (differences, groups) and the (bends, groups) sums


class FlowTerms(NamedTuple):
    """The terms of the penalty, one entry each, in depth order and before any weight."""

    gradient: Tensor
    curvature: Tensor


@dataclass
class _Units:
    """The weights of the entries for gradient=1 and for curvature=1, which depend on shapes alone; and what was made of
    them last."""

    gradient: Tensor
    curvature: Tensor
    last: tuple[float, float, Tensor] | None = None


def entry_weights(
    plan: Plan, options: FlowOptions, gradient: float, curvature: float, device: torch.device
) -> Tensor:
    """d loss / d entry of the sums of `plan`, float64. What it is made of is kept with the plan."""
    owner = _owner(device)
    key = options.norm, options.reduction, device, owner
    units = plan.kept.get(key)
    if units is None:
        units = _make_units(plan, options, device)
        if owner is not None and type(units.gradient) is Tensor:  # and not the tensor of a fake mode
            plan.kept[key] = units
    last = units.last
    if last is None or last[:2] != (gradient, curvature):
        with torch.inference_mode(False), torch.no_grad():
            vector = torch.add(units.gradient * gradient, units.curvature, alpha=curvature)
        units.last = last = (gradient, curvature, vector)
    return last[2]


def _owner(device: torch.device) -> Hashable:
    """Who may read what is made now: on a GPU the current stream, since no other one waits until it is there.

    Nobody (None) but the graph itself while a CUDA graph is captured: it has no values before the first replay, and
    its memory is the graph's.
    """
    if device.type != "cuda":
        return device.type
    return None if _capturing(device) else torch.cuda.current_stream(device).cuda_stream


def _capturing(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and not torch.compiler.is_compiling()
        and torch.cuda.is_current_stream_capturing()
    )


def _make_units(plan: Plan, options: FlowOptions, device: torch.device) -> _Units:
    """Filled in by kernels alone: a captured graph would replay a copy from the host from memory that is long free."""
    sizes = [stage.groups(int(options.per_sample)) for stage in plan.stages]
    entries = sum((s.differences + s.bends) * groups for s, groups in zip(plan.stages, sizes, strict=True))
    # Kept for later calls, which may want to differentiate.
    with torch.inference_mode(False), torch.no_grad():
        gradient, curvature = torch.zeros(2, entries, dtype=torch.float64, device=device).unbind(0)
        begin = 0
        for stage, groups in zip(plan.stages, sizes, strict=True):
            weight = 1 / stage.divisor(options.norm, options.reduction)
            bends = begin + stage.differences * groups
            end = bends + stage.bends * groups
            gradient[begin + stage.counted_by_earlier * groups : bends] = weight
            curvature[bends:end] = weight
            begin = end
    return _Units(gradient, curvature)


def weigh(name: str, weight: float | list[float] | Tensor, terms: Tensor) -> Tensor:
    """`(weight * terms).sum()`. ValueError for a tensor without values, where the terms have some."""
    if not isinstance(weight, (list, Tensor)):  # an int or a symbol too, where something traces
        return weight * terms.sum()
    if isinstance(weight, list):
        weight = _on_device(weight, terms.dtype, terms.device)
    else:
        if weight.device.type == "meta" != terms.device.type:
            raise ValueError(f"{name}: expected a tensor with values, got one on the device meta")
        weight = weight.to(terms.device)
    return (weight * terms).sum()


def _on_device(weights: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    if _capturing(device):
        runs = [(value, len(list(run))) for value, run in itertools.groupby(weights)]
        # By kernels alone, as in `_make_units`.
        filled = [torch.full((n,), value, dtype=dtype, device=device) for value, n in runs]
        return torch.cat(filled) if filled else torch.empty(0, dtype=dtype, device=device)
    host = torch.tensor(weights, dtype=dtype, device="cpu")
    return host.to(device, non_blocking=True)


def split(stats: Tensor, stages: Sequence[Stage], sums: Sums) -> Rows:
    """`stats` of `stages` as views."""
    rows, offset = [], 0
    for stage in stages:
        groups = stage.groups(sums.leading)
        bends = offset + stage.differences * groups
        end = bends + stage.bends * groups
        rows.append(
            (
                stats[offset:bends].view(stage.differences, groups),
                stats[bends:end].view(stage.bends, groups),
            )
        )
        offset = end
    return rows


def counted(rows: Tensor, stage: Stage, mask: Tensor) -> Tensor:
    """(rows, positions) -> (rows, B): sums over the positions of each sample that count."""
    positions = mask.expand(stage.shape[: mask.dim()]).reshape(-1)
    kept = torch.where(positions, rows, 0)  # a product with 0 would keep NaN
    return kept.view(len(rows), stage.batch, math.prod(stage.shape[1 : mask.dim()])).sum(2)


def assemble(
    rows: Rows,
    squares: Rows,
    plan: Plan,
    options: FlowOptions,
    mask: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> FlowTerms:
    """The terms from the kernels' sums; `squares` are squared norms per sample, which only angles need."""
    gradient, curvature = [], []
    root = reference.safe_sqrt if options.per_sample else _identity
    for stage, (lengths, bends), (square_lengths, square_bends) in zip(
        plan.stages, rows, squares, strict=True
    ):
        divisor = stage.divisor(options.norm, options.reduction, mask, lengths.device)
        gradient.append(_divided_sum(root(lengths[stage.counted_by_earlier :]), divisor))
        if options.angles:
            angles = reference.angle(square_lengths[:-1], square_lengths[1:], square_bends)
            averaged = "sum" if options.reduction == "sum" else "batchmean"
            divisor = stage.divisor(options.norm, averaged, mask, angles.device)
            curvature.append(_divided_sum(angles, divisor))
        else:
            curvature.append(_divided_sum(root(bends), divisor))
    return FlowTerms(
        torch.cat([t.to(device) for t in gradient]).to(dtype),
        torch.cat([t.to(device) for t in curvature]).to(dtype),
    )


def _divided_sum(rows: Tensor, divisor: float | Tensor) -> Tensor:
    """`(rows / divisor).sum(1)`; the divisor may be one for each sample."""
    return (rows / divisor).sum(1) if isinstance(divisor, Tensor) else rows.sum(1) / divisor


def _identity(rows: Tensor) -> Tensor:
    return rows
