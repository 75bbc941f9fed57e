"""Weights that change during training: wait, ramp up, hold, fall, stop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from .checks import check_choice
from .regularizers.base import Regularizer, finite

SHAPES = ("linear", "cosine", "exponential")
# What an exponential ramp begins with, and a fall ends with. Our choice.
_LEAST = 1e-3


class WeightSchedule:
    """Scale a regularizer over training, as a learning-rate scheduler does with a rate.

    ::

        flow = FeatureFlow(model, gradient=3.0, curvature=3.0)
        schedule = WeightSchedule(flow, wait=500, ramp=2000, fall_from=15000, stop=20000)
        for x, y in loader:
            loss = criterion(model(x), y)
            if schedule.factor:
                loss = loss + flow.loss()
            ...
            schedule.step()

    With ``s`` the number of steps taken, the ``scale`` of each target is the one it had at construction times
    ``factor``:

    * 0 where ``s < wait``
    * ``shape((s - wait + 1) / ramp)`` where ``wait <= s < wait + ramp``
    * 1 from then on
    * ``shape((stop - s) / (stop - fall_from))`` where ``fall_from <= s < stop``
    * 0 where ``s >= stop``

    with ``shape(t)`` = t (linear), (1 - cos(pi t)) / 2 (cosine) or 1000 ** (t - 1) (exponential).

    While the factor is 0 the targets are disabled: a flow captures nothing, and ``flow.loss()`` raises.

    Args:
        target: what is scaled: anything that follows :class:`ffr_ext.regularizers.Regularizer`, or several of them.
        wait, ramp, fall_from, stop: optimizer steps; 0 and None leave the phase out. A fall needs a stop.
        shape: of ramp and fall, ``"linear"``, ``"cosine"`` or ``"exponential"``.

    Raises:
        TypeError: ``target`` is no regularizer, or steps are no number.
        ValueError: negative or broken steps, an unknown shape, a stop before the weights are up, or a fall that is
            not between the two.
    """

    def __init__(
        self,
        target: Regularizer | Iterable[Regularizer],
        *,
        wait: int = 0,
        ramp: int = 0,
        fall_from: int | None = None,
        stop: int | None = None,
        shape: str = "linear",
    ) -> None:
        targets: list[Any] = list(target) if isinstance(target, (list, tuple)) else [target]
        for each in targets:
            if not isinstance(each, Regularizer):
                raise TypeError(
                    f"target: expected a regularizer such as FeatureFlow, got {type(each).__name__}"
                )
        if not targets:
            raise ValueError("target: expected at least one regularizer, got none")
        wait, ramp = _steps("wait", wait), _steps("ramp", ramp)
        stop = None if stop is None else _steps("stop", stop)
        fall_from = None if fall_from is None else _steps("fall_from", fall_from)
        check_choice("shape", shape, SHAPES)
        if stop is not None and stop < wait + ramp:
            raise ValueError(f"stop: expected at least wait + ramp = {wait + ramp} steps, got {stop}")
        if fall_from is not None and stop is None:
            raise ValueError(f"fall_from: expected a stop= to fall to, got fall_from={fall_from} and none")
        if fall_from is not None and stop is not None and not wait + ramp <= fall_from < stop:
            raise ValueError(
                f"fall_from: expected at least wait + ramp = {wait + ramp} steps and fewer than stop = {stop}, got "
                f"{fall_from}"
            )
        self.targets: list[Regularizer] = targets
        self.wait, self.ramp, self.fall_from, self.stop, self.shape = wait, ramp, fall_from, stop, shape
        self.steps = 0
        self._full = [each.scale for each in targets]
        self.set(0)

    @property
    def target(self) -> Regularizer:
        """What is scaled; of several the first."""
        return self.targets[0]

    @property
    def flow(self) -> Any:
        """The same, under the name it had when only a FeatureFlow could be scaled."""
        return self.targets[0]

    @property
    def factor(self) -> float:
        """What the scales are multiplied by now, in 0 .. 1."""
        return self.factor_at(self.steps)

    def factor_at(self, steps: int) -> float:
        """What the scales are multiplied by after so many steps."""
        if steps < self.wait or (self.stop is not None and steps >= self.stop):
            return 0.0
        if steps < self.wait + self.ramp:
            return self._shaped((steps - self.wait + 1) / self.ramp)
        if self.fall_from is not None and self.stop is not None and steps >= self.fall_from:
            return self._shaped((self.stop - steps) / (self.stop - self.fall_from))
        return 1.0

    def _shaped(self, part: float) -> float:
        if self.shape == "cosine":
            return (1 - math.cos(math.pi * part)) / 2
        return part if self.shape == "linear" else float(_LEAST ** (1 - part))

    def step(self) -> None:
        """Count one optimizer step and set the scales for the next one."""
        self.set(self.steps + 1)

    def set(self, steps: int) -> None:
        """Set the scales for the step after ``steps`` steps, for trainers that count them themselves."""
        self.steps = _steps("steps", steps)
        factor = self.factor
        for target, full in zip(self.targets, self._full, strict=True):
            target.scale = full * factor
            target.enabled = factor != 0

    def state_dict(self) -> dict[str, Any]:
        """The steps taken, and the scales that the factor multiplies. The settings belong to the code that resumes, as
        those of a learning-rate scheduler do."""
        return {"steps": self.steps, "scales": list(self._full)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        if not isinstance(state, Mapping) or "steps" not in state:
            raise ValueError(f"state: expected what state_dict() returned, {{'steps': ...}}, got {state!r}")
        steps, full = _steps("steps", state["steps"]), state.get("scales", self._full)
        if not isinstance(full, list | tuple) or len(full) != len(self.targets):
            raise ValueError(f"state: expected the scales of {len(self.targets)} regularizers, got {full!r}")
        # A regularizer whose own state was loaded before this schedule was made had the scale of a step then.
        self._full = [finite("scales", scale) for scale in full]
        self.set(steps)


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
