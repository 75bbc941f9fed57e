"""What WeightSchedule takes for a number of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flow_models import ResidualNet

from ffr_ext import FeatureFlow
from ffr_ext.schedules import WeightSchedule


def schedule(**options: Any) -> WeightSchedule:
    return WeightSchedule(FeatureFlow(ResidualNet(2)), **options)


@pytest.mark.parametrize(
    "three", [3, 3.0, np.int64(3), np.float32(3)], ids=lambda value: type(value).__name__
)
def test_whole_numbers_of_any_kind_are_steps(three: Any) -> None:
    made = schedule(wait=three, ramp=three, stop=2 * three)
    made.set(three)
    assert [type(n) for n in (made.wait, made.ramp, made.stop, made.steps)] == [int] * 4
    assert made.factor == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", ["wait", "ramp", "stop"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (True, TypeError, "expected a number of steps >= 0, got True"),
        ("3", TypeError, "expected a number of steps >= 0, got '3'"),
        ([3], TypeError, r"expected a number of steps >= 0, got \[3\]"),
        (1.5, ValueError, "expected a whole number of steps, got 1.5"),
        (np.float64(1.5), ValueError, "expected a whole number of steps, got 1.5"),
        (float("nan"), ValueError, "expected a number of steps >= 0, got nan"),
        (float("inf"), ValueError, "expected a number of steps >= 0, got inf"),
        (-1, ValueError, "expected a number of steps >= 0, got -1"),
    ],
)
def test_what_is_no_number_of_steps(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{name}: {message}"):
        schedule(**{name: value})


@pytest.mark.parametrize("name", ["wait", "ramp"])
def test_only_a_stop_can_be_left_out_with_none(name: str) -> None:
    assert schedule(stop=None).stop is None
    with pytest.raises(TypeError, match=f"{name}: expected a number of steps >= 0, got None"):
        schedule(**{name: None})


def test_a_schedule_is_of_a_regularizer() -> None:
    with pytest.raises(
        TypeError, match="target: expected a regularizer such as FeatureFlow, got ResidualNet"
    ):
        WeightSchedule(ResidualNet(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.set(-1), ValueError, "steps: expected a number of steps >= 0, got -1"),
        (lambda s: s.set("3"), TypeError, "steps: expected a number of steps >= 0, got '3'"),
        (lambda s: s.load_state_dict({}), ValueError, r"state: expected what state_dict\(\) returned.*\{\}"),
        (
            lambda s: s.load_state_dict(None),
            ValueError,
            r"state: expected what state_dict\(\) returned.*None",
        ),
        (lambda s: s.load_state_dict({"steps": 1.5}), ValueError, "steps: expected a whole number of steps"),
    ],
)
def test_a_wrong_step_changes_nothing(change: Any, error: type[Exception], message: str) -> None:
    half_way = schedule(ramp=4)
    half_way.set(1)
    with pytest.raises(error, match=message):
        change(half_way)
    assert half_way.steps == 1
    assert half_way.flow.scale == 0.5
