"""What the arguments of a StructuredOutput may be, and the messages about what they may not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("input", "output")
ARGUMENTS = {"input": "first", "output": "last"}
CALLED = {"input": "x", "output": "y"}
MIRRORS = ("tied", "free")
RECONSTRUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda hidden: hidden,
}
Reconstruction = str | Callable[[Tensor], Tensor]
MirrorSpec = str | nn.Module | Mapping[str, nn.Module]


class Number:
    """A float attribute >= 0."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else instance.__dict__[f"_{self.name}"]

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[f"_{self.name}"] = check_number(self.name, value)


def check_tasks(name: str, tasks: Any) -> tuple[str, ...]:
    """The names of tasks, or ValueError."""
    listed = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    if not listed or any(task not in TASKS for task in listed):
        raise ValueError(f"{name}: expected one or both of 'input' and 'output', got {tasks!r}")
    return listed


def check_number(name: str, value: Any) -> float:
    """A finite number >= 0 as a float, numpy's too."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number >= 0, got {value!r}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return number


def check_given(input: float, output: float, first: Any, last: Any) -> None:
    """ValueError for a task with a weight and no layers, or no task at all."""
    for task, weight, chain in (("input", input, first), ("output", output, last)):
        if weight and chain is None:
            raise ValueError(
                f"{task}: expected 0 without layers for it, got {weight:g}; pass {ARGUMENTS[task]}=<its layers>"
            )
    if first is None and last is None:
        raise ValueError("first, last: expected the layers of at least one task, got none")


def choose_mirrors(mirror: Any, has_input: bool, has_output: bool) -> dict[str, str | nn.Module]:
    """For each task "tied", "free" or the user's module."""
    if isinstance(mirror, nn.Module):
        if has_input and has_output:
            raise ValueError(
                "mirror: one module cannot be the mirror of two chains; pass {'input': ..., 'output': ...}"
            )
        return dict.fromkeys(TASKS, mirror)
    if isinstance(mirror, Mapping):
        unknown = [task for task in mirror if task not in TASKS]
        if unknown:
            raise ValueError(f"mirror: expected the keys 'input' and 'output', got {unknown[0]!r}")
        return {task: _one_mirror(mirror.get(task, "tied")) for task in TASKS}
    return {task: _one_mirror(mirror) for task in TASKS}


def _one_mirror(mirror: Any) -> str | nn.Module:
    if isinstance(mirror, nn.Module):
        return mirror
    if not isinstance(mirror, str):
        raise TypeError(
            f"mirror: expected 'tied', 'free', a module or a dict of them, got {type(mirror).__name__}"
        )
    if mirror not in MIRRORS:
        raise ValueError(f"mirror: expected 'tied', 'free', a module or a dict of them, got {mirror!r}")
    return mirror


def choose_reconstruction(value: Any, mirror: str | nn.Module) -> Reconstruction:
    if isinstance(value, str) and value != "auto" and value not in RECONSTRUCTIONS:
        raise ValueError(
            f"reconstruction: expected 'auto', {', '.join(map(repr, RECONSTRUCTIONS))} or a callable, got {value!r}"
        )
    if not isinstance(value, str) and not callable(value):
        raise TypeError(f"reconstruction: expected a name or a callable, got {type(value).__name__}")
    if value == "auto" and isinstance(mirror, nn.Module):
        return "identity"
    kept: Reconstruction = value
    return kept


def has_rows(called: str, tensor: Any) -> bool:
    """Whether a batch has rows; TypeError or ValueError if it is no batch of floating-point rows."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{called}: expected a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{called}: expected a floating-point tensor, got {tensor.dtype}")
    if tensor.dim() < 2:
        raise ValueError(f"{called}: expected a batch of shape (B, ...), got shape {tuple(tensor.shape)}")
    return len(tensor) > 0
