"""How far an optimizer's step goes: what a proximal map after it has to multiply its threshold by."""

from __future__ import annotations

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


def step_sizes(tensors: list[Tensor], otherwise: float) -> list[float]:
    """For each parameter the distance that the optimizer which stepped it last goes for a gradient of 1 that stays:
    the learning rate of its group, times (1 - dampening) / (1 - momentum) for optimizers with a momentum.

    `otherwise` for a parameter that no optimizer has stepped.
    """
    found: dict[int, float] = {}
    for optimizer, _ in sorted(_stepped.items(), key=lambda item: item[1]):
        for group in optimizer.param_groups:
            size = _size(group)
            found.update((id(parameter), size) for parameter in group["params"])
    return [found.get(id(tensor), otherwise) for tensor in tensors]


def _size(group: dict[str, Any]) -> float:
    momentum = float(group.get("momentum") or 0.0)
    dampening = float(group.get("dampening") or 0.0)
    gain = (1 - dampening) / (1 - momentum) if 0 < momentum < 1 else 1.0
    return float(group["lr"]) * gain
