"""Which steps an optimizer really took, and how far: when a proximal map follows, and what multiplies its threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

# Optimizer -> the number of its last step among all steps. Filled once somebody has called `watch`.
_stepped: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_watching: list[Any] = []


def watch() -> None:
    """Take note of every optimizer that steps from now on."""
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_note))


def _note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    _stepped[optimizer] = max(_stepped.values(), default=0) + 1


@dataclass(frozen=True)
class Step:
    """The last step of the optimizer that moved a parameter last."""

    number: int  # among all steps of all optimizers
    size: float  # how far it goes for a gradient of 1 that stays


def last_steps(tensors: list[Tensor]) -> list[Step | None]:
    """For each parameter the last step that moved it; None where no optimizer did. A step that a GradScaler left out
    is none.

    The size is the learning rate of its group, times (1 - dampening) / (1 - momentum) for optimizers with a momentum.
    """
    found: dict[int, Step] = {}
    for optimizer, number in sorted(_stepped.items(), key=lambda item: item[1]):
        for group in optimizer.param_groups:
            step = Step(number, _size(group))
            found.update((id(parameter), step) for parameter in group["params"])
    return [found.get(id(tensor)) for tensor in tensors]


def _size(group: dict[str, Any]) -> float:
    momentum = float(group.get("momentum") or 0.0)
    dampening = float(group.get("dampening") or 0.0)
    gain = (1 - dampening) / (1 - momentum) if 0 < momentum < 1 else 1.0
    return float(group["lr"]) * gain
