"""WeightSchedule: its factors, what it scales, how it goes on, and what it takes for a number of steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flow_models import ResidualNet, expected, images

from ffr_ext import FeatureFlow
from ffr_ext.schedules import WeightSchedule


def factors(steps: int, **options: Any) -> list[float]:
    schedule = WeightSchedule(FeatureFlow(ResidualNet(2)), **options)
    values = []
    for _ in range(steps):
        values.append(round(schedule.factor, 6))
        schedule.step()
    return values


@pytest.mark.parametrize(
    ("options", "values"),
    [
        pytest.param({}, [1, 1, 1], id="nothing: full weight from the start"),
        pytest.param({"wait": 2}, [0, 0, 1, 1], id="wait"),
        pytest.param({"ramp": 4}, [0.25, 0.5, 0.75, 1, 1], id="linear ramp, up on its last step"),
        pytest.param({"ramp": 4, "shape": "cosine"}, [0.146447, 0.5, 0.853553, 1, 1], id="cosine ramp"),
        pytest.param({"wait": 1, "ramp": 2, "stop": 4}, [0, 0.5, 1, 1, 0, 0], id="wait, ramp, hold, stop"),
        pytest.param({"stop": 0}, [0, 0], id="never on"),
        pytest.param({"fall_from": 1, "stop": 5}, [1, 1, 0.75, 0.5, 0.25, 0, 0], id="linear fall"),
        pytest.param(
            {"ramp": 2, "fall_from": 3, "stop": 5, "shape": "cosine"},
            [0.5, 1, 1, 1, 0.5, 0],
            id="cosine fall",
        ),
        pytest.param(
            {"ramp": 3, "fall_from": 3, "stop": 6, "shape": "exponential"},
            [0.01, 0.1, 1, 1, 0.1, 0.01, 0],
            id="exponential ramp and fall",
        ),
    ],
)
def test_factors(options: dict[str, Any], values: list[float]) -> None:
    assert factors(len(values), **options) == values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wait": -1}, "wait: expected a number of steps >= 0, got -1"),
        ({"ramp": -2}, "ramp"),
        ({"wait": 3, "ramp": 3, "stop": 5}, "stop: expected at least wait \\+ ramp = 6"),
        ({"shape": "square"}, "shape"),
        ({"fall_from": 3}, "fall_from: expected a stop= to fall to"),
        ({"ramp": 4, "fall_from": 3, "stop": 9}, "fall_from: expected at least wait \\+ ramp = 4"),
        ({"fall_from": 9, "stop": 9}, "fall_from: .* fewer than stop = 9, got 9"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factors(1, **options)


@pytest.mark.parametrize(
    "weight", [3.0, [1.0, 2.0], torch.tensor([1.0, 4.0])], ids=["float", "list", "tensor"]
)
def test_all_forms_of_weights_are_scaled_and_stay_what_the_user_set(weight: Any) -> None:
    model = ResidualNet(2)
    full = expected(model, images(), backend="reference", gradient=weight, curvature=0.0)[0]
    with FeatureFlow(model, gradient=weight, curvature=0.0, backend="reference") as flow:
        schedule = WeightSchedule(flow, ramp=2)
        for part in (0.5, 1.0):
            model(images())
            assert float(flow.loss()) == pytest.approx(part * float(full), rel=1e-5)
            assert flow.gradient is weight
            schedule.step()


def test_the_loss_follows_and_a_weight_of_zero_captures_nothing() -> None:
    model = ResidualNet()
    full = expected(model, images(), backend="reference", gradient=2.0)[0]
    with FeatureFlow(model, backend="reference", gradient=2.0) as flow:
        schedule = WeightSchedule(flow, wait=1, ramp=2, stop=4)
        seen = []
        for _ in range(5):
            model(images())
            if schedule.factor:
                seen.append(float(flow.loss().detach() / full))
            else:
                assert flow._recorder.features == []
                with pytest.raises(RuntimeError, match="disabled"):
                    flow.loss()
            schedule.step()
    assert seen == pytest.approx([0.5, 1, 1])


def test_a_resumed_schedule_continues() -> None:
    schedule = WeightSchedule(FeatureFlow(ResidualNet(2), gradient=4.0), wait=1, ramp=4)
    for _ in range(3):
        schedule.step()
    flow = FeatureFlow(ResidualNet(2), gradient=4.0)
    resumed = WeightSchedule(flow, wait=1, ramp=4)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.factor == schedule.factor == 0.75
    assert flow.scale == 0.75
    assert flow.gradient == 4.0


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("schedule_first", [True, False])
def test_a_resumed_regularizer_and_its_schedule_go_on_in_any_order(steps: int, schedule_first: bool) -> None:
    """A regularizer's own state has the scale of a step, which is 0 while the schedule waits."""
    saved = FeatureFlow(ResidualNet(2))
    schedule = WeightSchedule(saved, wait=1, ramp=4)
    schedule.set(steps)
    states = saved.state_dict(), schedule.state_dict()
    flow = FeatureFlow(ResidualNet(2))
    if not schedule_first:
        flow.load_state_dict(states[0])
    resumed = WeightSchedule(flow, wait=1, ramp=4)
    if schedule_first:
        flow.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert flow.scale == saved.scale
    for _ in range(4):
        schedule.step()
        resumed.step()
        assert flow.scale == saved.scale > 0


def test_a_state_without_scales_is_read_too() -> None:
    resumed = WeightSchedule(FeatureFlow(ResidualNet(2)), wait=1, ramp=4)
    resumed.load_state_dict({"steps": 3})
    assert resumed.flow.scale == 0.75


# --- describe -------------------------------------------------------------------------------------


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
        (
            lambda s: s.load_state_dict({"steps": 2, "scales": [1.0, 1.0]}),
            ValueError,
            "state: expected the scales of 1 regularizers",
        ),
    ],
)
def test_a_wrong_step_changes_nothing(change: Any, error: type[Exception], message: str) -> None:
    half_way = schedule(ramp=4)
    half_way.set(1)
    with pytest.raises(error, match=message):
        change(half_way)
    assert half_way.steps == 1
    assert half_way.flow.scale == 0.5
