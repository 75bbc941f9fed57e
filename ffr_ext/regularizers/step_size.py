"""Which steps an optimizer really took, and how far: when a proximal map follows, and what multiplies its threshold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

# What each optimizer's last step was. Filled once somebody has called `watch`.
_taken: WeakKeyDictionary[Optimizer, _Taken] = WeakKeyDictionary()
_numbers = itertools.count(1)
_watching: list[Any] = []


class _Taken(NamedTuple):
    number: int  # among all steps of all optimizers
    left_out: Tensor | None  # 0-dim, on the device


class Step(NamedTuple):
    """The last step of the optimizer that moved a parameter last: how far it goes for a gradient of 1 that stays, and
    not at all where `left_out` is there and True."""

    size: float
    number: int = 0
    left_out: Tensor | None = None


def watch() -> None:
    """Take note of every optimizer that steps from now on."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_note))


def _note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # A GradScaler does not call the step of most optimizers when it leaves it out. Fused ones it calls, with
    # `found_inf` on them, and their kernel leaves the step out.
    found = getattr(optimizer, "found_inf", None)
    _taken[optimizer] = _Taken(next(_numbers), found != 0 if isinstance(found, Tensor) else None)


def last_steps(tensors: Sequence[Tensor]) -> list[Step | None]:
    """For each parameter the last step that moved it; None where no optimizer did.

    The size is the learning rate of its group, times (1 - dampening) / (1 - momentum) for optimizers with a momentum.
    """
    found: dict[int, Step] = {}
    for optimizer, taken in sorted(_taken.items(), key=lambda item: item[1].number):
        for group in optimizer.param_groups:
            step = Step(_size(group), *taken)
            found.update((id(parameter), step) for parameter in group["params"])
    return [found.get(id(tensor)) for tensor in tensors]


@torch.no_grad()
def overflows(parameters: Sequence[Tensor]) -> Tensor:
    """1 where some gradient of this rank is not finite, else 0; a 0-dim tensor on the first one's device."""
    here = parameters[0].device
    worst = torch.zeros((), device=here)
    for parameter in parameters:
        if parameter.grad is not None:
            part: Any = parameter.grad
            part = part.to_local() if hasattr(part, "to_local") else part
            part = part.coalesce().values() if part.is_sparse else part
            worst = torch.maximum(worst, (~torch.isfinite(part)).any().to(worst))
    return worst


def _size(group: dict[str, Any]) -> float:
    momentum = float(group.get("momentum") or 0.0)
    dampening = float(group.get("dampening") or 0.0)
    gain = (1 - dampening) / (1 - momentum) if 0 < momentum < 1 else 1.0
    return float(group["lr"]) * gain
