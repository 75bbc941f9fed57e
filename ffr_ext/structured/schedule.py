"""Weights that hold, then fall."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, Protocol

from .arguments import TASKS, check_tasks

SHAPES = ("linear", "cosine", "exponential", "stairs")


class Scalable(Protocol):
    """What a :class:`HoldThenFall` drives."""

    def scale_weights(self, factor: float, weights: Iterable[str] = ...) -> None:
        """Multiply the named weights by ``factor`` from now on."""


class HoldThenFall:
    """Hold the weights of tasks, then let them fall to 0.

    ::

        tasks = StructuredOutput(model, first=model[:2], last=model[5:], input=1.0, output=1.0)
        schedules = [HoldThenFall(tasks, fall_from=steps // 10, stop=steps // 2, weights="input"),
                     HoldThenFall(tasks, fall_from=steps // 10, stop=7 * steps // 10, weights="output")]

    With ``s`` the number of steps taken and ``t = (s - fall_from) / (stop - fall_from)``, the factor is 1 up to
    ``s = fall_from``, 0 from ``s = stop`` on, and in between::

        linear: 1 - t     cosine: (1 + cos(pi t)) / 2     exponential: exp(-(s - fall_from) / sigma)

    ``"stairs"`` is 1 before ``fall_from`` and 0 from then on, which is pre-training. The fractions above are those of
    Belharbi et al.'s program (epochs 100, 500 and 700 of 1,000, linear). Stairs, linear and exponential are the shapes
    of their ESANN 2016 paper, where the weights of the tasks also sum to one, which is not asked here; cosine is ours.

    Args:
        target: a :class:`StructuredOutput`, or anything with ``scale_weights(factor, weights)``.
        fall_from, stop: optimiser steps. ``stop`` may be left out with ``"stairs"``, and with ``"exponential"`` if
            ``sigma`` is given: then the factor is never 0.
        shape: ``"linear"``, ``"cosine"``, ``"exponential"`` or ``"stairs"``.
        sigma: of ``"exponential"``, in steps; default a fifth of the fall (ours), where 0.7 % is left at ``stop``.
        weights: which, ``"input"``, ``"output"`` or both.

    Raises:
        TypeError: a target that cannot be driven, or steps that are no number. ValueError: negative or broken
            steps, an unknown shape or weight, ``stop`` not after ``fall_from``.
    """

    def __init__(
        self,
        target: Scalable,
        *,
        fall_from: int,
        stop: int | None = None,
        shape: str = "linear",
        sigma: float | None = None,
        weights: str | Iterable[str] = TASKS,
    ) -> None:
        if not callable(getattr(target, "scale_weights", None)):
            raise TypeError(f"target: expected a StructuredOutput, got {type(target).__name__}")
        self.weights = check_tasks("weights", weights)
        self.fall_from, self.stop = _steps("fall_from", fall_from), _stop(stop, fall_from, shape, sigma)
        self.shape, self.sigma = shape, _sigma(sigma, shape, self.fall_from, self.stop)
        self.target = target
        self.steps = 0
        self.set(0)

    @property
    def factor(self) -> float:
        """What the weights are multiplied by now, in 0 .. 1."""
        return self.factor_at(self.steps)

    def factor_at(self, steps: int) -> float:
        """What the weights are multiplied by after so many steps."""
        past = steps - self.fall_from
        if past < 0:
            return 1.0
        if self.shape == "stairs" or (self.stop is not None and steps >= self.stop):
            return 0.0
        if self.shape == "exponential":
            assert self.sigma is not None
            return math.exp(-past / self.sigma)
        assert self.stop is not None
        part = past / (self.stop - self.fall_from)
        return 1 - part if self.shape == "linear" else (1 + math.cos(math.pi * part)) / 2

    def step(self) -> None:
        """Count one optimiser step and set the weights for the next one."""
        self.set(self.steps + 1)

    def set(self, steps: int) -> None:
        """Set the weights for the step after ``steps`` steps, for trainers that count them themselves."""
        self.steps = _steps("steps", steps)
        self.target.scale_weights(self.factor, self.weights)

    def state_dict(self) -> dict[str, Any]:
        """The steps taken; the settings belong to the code that resumes."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        if not isinstance(state, Mapping) or "steps" not in state:
            raise ValueError(f"state: expected what state_dict() returned, {{'steps': ...}}, got {state!r}")
        self.set(state["steps"])


def _stop(stop: Any, fall_from: Any, shape: Any, sigma: Any) -> int | None:
    if shape not in SHAPES:
        raise ValueError(f"shape: expected one of {', '.join(map(repr, SHAPES))}, got {shape!r}")
    if stop is None:
        if shape in ("linear", "cosine") or (shape == "exponential" and sigma is None):
            raise ValueError(f"stop: expected the step at which the {shape} fall ends, got None")
        return None
    stop = _steps("stop", stop)
    if shape == "stairs" and stop != fall_from:
        raise ValueError(
            f"stop: expected none with shape='stairs', whose step is fall_from={fall_from}, got {stop}"
        )
    if shape != "stairs" and stop <= fall_from:
        raise ValueError(f"stop: expected more than fall_from = {fall_from} steps, got {stop}")
    return int(stop)


def _sigma(sigma: Any, shape: str, fall_from: int, stop: int | None) -> float | None:
    if sigma is None:
        return None if stop is None or shape != "exponential" else (stop - fall_from) / 5
    if shape != "exponential":
        raise ValueError(f"sigma: expected None with shape={shape!r}, got {sigma!r}")
    if isinstance(sigma, bool) or not isinstance(sigma, Real):
        raise TypeError(f"sigma: expected a number of steps > 0, got {sigma!r}")
    if not 0 < float(sigma) < math.inf:
        raise ValueError(f"sigma: expected a number of steps > 0, got {sigma}")
    return float(sigma)


def _steps(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number of steps >= 0, got {value!r}")
    number = float(value)
    if not 0 <= number < math.inf or number != int(number):
        raise ValueError(f"{name}: expected a whole number of steps >= 0, got {value}")
    return int(number)
