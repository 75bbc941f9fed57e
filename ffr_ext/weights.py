"""The weights of the terms as the loss needs them: on the device, one for every entry of the kernels' sums."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import FlowOptions
from .stages import Plan


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
    if isinstance(weight, list):
        weight = _on_device(weight, terms.dtype, terms.device)
    elif isinstance(weight, Tensor):
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
