"""Weights that change during training: wait, ramp up, hold, stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from .checks import check_choice
from .flow.feature_flow import FeatureFlow

SHAPES = ("linear", "cosine")


class WeightSchedule:
    """Scale the weights of a :class:`FeatureFlow` over training, as a learning-rate scheduler does with a
    rate.

    ::

        flow = FeatureFlow(model, gradient=3.0, curvature=3.0)
        schedule = WeightSchedule(flow, wait=500, ramp=2000, stop=20000)
        for x, y in loader:
            loss = criterion(model(x), y)
            if schedule.factor:
                loss = loss + flow.loss()
            ...
            schedule.step()

    With ``s`` the number of steps taken, the weights are the flow's weights at construction times
    ``factor``::

        0                                    s < wait
        shape((s - wait + 1) / ramp)         wait <= s < wait + ramp      linear: t, cosine: (1 - cos(pi
        t)) / 2 1                                    from then on
        0                                    s >= stop

    While the factor is 0 the flow is disabled: it captures nothing, and ``flow.loss()`` raises.

    Args:
        flow: the flow whose weights are scaled.
        wait, ramp, stop: optimiser steps; 0 and None leave the phase out.
        shape: of the ramp, ``"linear"`` or ``"cosine"``.

    Raises:
        TypeError: ``flow`` is no FeatureFlow, or steps are no number.
        ValueError: negative or broken steps, an unknown shape, or a stop before the weights are up.
    """

    def __init__(
        self,
        flow: FeatureFlow,
        *,
        wait: int = 0,
        ramp: int = 0,
        stop: int | None = None,
        shape: str = "linear",
    ) -> None:
        if not isinstance(flow, FeatureFlow):
            raise TypeError(f"flow: expected a FeatureFlow, got {type(flow).__name__}")
        wait, ramp = _steps("wait", wait), _steps("ramp", ramp)
        stop = None if stop is None else _steps("stop", stop)
        check_choice("shape", shape, SHAPES)
        if stop is not None and stop < wait + ramp:
            raise ValueError(f"stop: expected at least wait + ramp = {wait + ramp} steps, got {stop}")
        self.flow = flow
        self.wait, self.ramp, self.stop, self.shape = wait, ramp, stop, shape
        self.steps = 0
        self._full = (flow.gradient, flow.curvature)
        self.set(0)

    @property
    def factor(self) -> float:
        """What the weights are multiplied by now, in 0 .. 1."""
        return self.factor_at(self.steps)

    def factor_at(self, steps: int) -> float:
        """What the weights are multiplied by after so many steps."""
        if steps < self.wait or (self.stop is not None and steps >= self.stop):
            return 0.0
        if steps >= self.wait + self.ramp:
            return 1.0
        part = (steps - self.wait + 1) / self.ramp
        return part if self.shape == "linear" else (1 - math.cos(math.pi * part)) / 2

    def step(self) -> None:
        """Count one optimiser step and set the weights for the next one."""
        self.set(self.steps + 1)

    def set(self, steps: int) -> None:
        """Set the weights for the step after ``steps`` steps, for trainers that count them themselves."""
        self.steps = _steps("steps", steps)
        factor = self.factor
        self.flow.gradient, self.flow.curvature = (_times(weight, factor) for weight in self._full)
        self.flow.enabled = factor != 0

    def state_dict(self) -> dict[str, Any]:
        """The steps taken. The settings belong to the code that resumes, as those of a learning-rate
        scheduler do."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        if not isinstance(state, Mapping) or "steps" not in state:
            raise ValueError(f"state: expected what state_dict() returned, {{'steps': ...}}, got {state!r}")
        self.set(state["steps"])


def _steps(name: str, value: Any) -> int:
    """A number of steps, numpy's too, as an int."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number of steps >= 0, got {value!r}")
    number: Any = value
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}: expected a number of steps >= 0, got {value}")
    if number != int(number):
        raise ValueError(f"{name}: expected a whole number of steps, got {value}")
    return int(number)


def _times(weight: float | Sequence[float] | Tensor, factor: float) -> float | list[float] | Tensor:
    if isinstance(weight, Tensor):
        return weight * factor
    if isinstance(weight, Sequence):
        return [entry * factor for entry in weight]
    return weight * factor
