"""Weights that hold, then fall."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from structured_nets import mlp

from ffr_ext.structured import HoldThenFall, StructuredOutput


def tasks() -> StructuredOutput:
    model = mlp(torch.float32)
    return StructuredOutput(model, first=model[:2], last=model[5:], input=2.0, output=3.0)


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"shape": "linear"}, {0: 1, 9: 1, 10: 1, 15: 0.75, 20: 0.5, 29: 0.05, 30: 0, 99: 0}),
        ({"shape": "cosine"}, {0: 1, 10: 1, 15: (1 + math.cos(math.pi / 4)) / 2, 20: 0.5, 30: 0}),
        ({"shape": "exponential"}, {0: 1, 10: 1, 14: math.exp(-1), 29: math.exp(-19 / 4), 30: 0}),
        ({"shape": "exponential", "sigma": 10, "stop": None}, {10: 1, 20: math.exp(-1), 110: math.exp(-10)}),
        ({"shape": "stairs", "stop": None}, {0: 1, 9: 1, 10: 0, 11: 0}),
        ({"fall_from": 0}, {0: 1, 15: 0.5, 30: 0}),
    ],
)
def test_the_factor_at_every_corner(options: dict[str, Any], factors: dict[int, float]) -> None:
    schedule = HoldThenFall(tasks(), **{"fall_from": 10, "stop": 30, **options})
    for steps, factor in factors.items():
        assert schedule.factor_at(steps) == pytest.approx(factor, abs=1e-12)
        schedule.set(steps)
        assert schedule.target.input_scale == schedule.target.output_scale == schedule.factor  # type: ignore[attr-defined]


def test_two_schedules_drive_the_two_tasks_apart() -> None:
    target = tasks()
    schedules = [
        HoldThenFall(target, fall_from=1, stop=3, weights="input"),
        HoldThenFall(target, fall_from=1, stop=5, weights=["output"]),
    ]
    seen = []
    for _ in range(6):
        seen.append((target.input_scale, target.output_scale))
        for schedule in schedules:
            schedule.step()
    assert seen == [(1, 1), (1, 1), (0.5, 0.75), (0, 0.5), (0, 0.25), (0, 0)]
    x, y = torch.rand(2, 6), torch.rand(2, 7)
    assert target.loss(x, y) == 0
    assert target.terms() == {}
    assert (target.input, target.output) == (2, 3)


def test_a_saved_schedule_goes_on() -> None:
    first, target = HoldThenFall(tasks(), fall_from=1, stop=5), tasks()
    for _ in range(3):
        first.step()
    second = HoldThenFall(target, fall_from=1, stop=5)
    second.load_state_dict(first.state_dict())
    assert (second.steps, target.output_scale) == (3, 0.5)
    with pytest.raises(ValueError, match=r"state: expected what state_dict\(\) returned"):
        second.load_state_dict({"epoch": 3})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"target": object()}, TypeError, r"target: expected a StructuredOutput, got object"),
        ({"stop": 10}, ValueError, r"stop: expected more than fall_from = 10 steps, got 10"),
        ({"stop": None}, ValueError, r"stop: expected the step at which the linear fall ends, got None"),
        (
            {"stop": None, "shape": "exponential"},
            ValueError,
            r"stop: expected the step at which the exponential fall ends",
        ),
        ({"shape": "stairs"}, ValueError, r"stop: expected none with shape='stairs'"),
        (
            {"shape": "steps"},
            ValueError,
            r"shape: expected one of 'linear', 'cosine', 'exponential', 'stairs', got 'steps'",
        ),
        ({"fall_from": -1}, ValueError, r"fall_from: expected a whole number of steps >= 0, got -1"),
        ({"fall_from": 0.5}, ValueError, r"fall_from: expected a whole number of steps >= 0, got 0.5"),
        ({"fall_from": "1"}, TypeError, r"fall_from: expected a number of steps >= 0, got '1'"),
        ({"sigma": 3}, ValueError, r"sigma: expected None with shape='linear', got 3"),
        ({"sigma": 0, "shape": "exponential"}, ValueError, r"sigma: expected a number of steps > 0, got 0"),
        (
            {"weights": "both"},
            ValueError,
            r"weights: expected one or both of 'input' and 'output', got 'both'",
        ),
        ({"weights": []}, ValueError, r"weights: expected one or both"),
    ],
)
def test_wrong_settings_are_refused_before_any_weight_changes(
    options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    target = tasks()
    target.scale_weights(0.5)
    with pytest.raises(kind, match=message):
        HoldThenFall(**{"target": target, "fall_from": 10, "stop": 30, **options})
    assert (target.input_scale, target.output_scale) == (0.5, 0.5)
