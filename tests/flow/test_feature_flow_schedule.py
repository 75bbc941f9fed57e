"""WeightSchedule, describe(), enabled and passes delimited by hand."""

from __future__ import annotations

from typing import Any

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


# --- describe -------------------------------------------------------------------------------------


def test_describe_names_layers_shapes_stages_and_terms(capsys: pytest.CaptureFixture[str]) -> None:
    flow = FeatureFlow(ResidualNet(3), gradient=2.0, transition="pool", norm="l2")
    description = flow.describe(images())
    assert description.names == flow.layers
    assert description.shapes == [(2, 4, 8, 8)] * 3 + [(2, 4, 4, 4)] * 3
    assert description.stages == [[0, 1, 2], [3, 4, 5]]
    assert description.gradient == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]
    assert description.curvature == [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5)]
    assert description.bytes == 3 * 2 * 4 * (64 + 16) * 4
    text = capsys.readouterr().out
    for words in (
        "early.0",
        "2x4x8x8",
        "5 gradient terms, weight 2: 0-1",
        "4 curvature terms",
        "norm l2",
        "pool",
    ):
        assert words in text


@pytest.mark.parametrize("transition", ["break", "pool"])
def test_describe_counts_the_terms_that_the_loss_has(transition: str) -> None:
    model = ResidualNet(3)
    with FeatureFlow(model, backend="reference", transition=transition) as flow:
        description = flow.describe(images())
        model(images())
        terms = flow.terms()
    assert len(description.gradient) == len(terms.gradient)
    assert len(description.curvature) == len(terms.curvature)


def test_describe_leaves_the_model_and_a_pending_forward_as_they_were() -> None:
    model = ResidualNet()
    model.late.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with FeatureFlow(model, backend="reference") as flow:
        flow.describe(images())
        assert [m.training for m in (model, model.early, model.late)] == [True, True, False]
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        model(images())
        flow.loss()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "inputs", [(torch.ones(2, 3, 8, 8),), {"x": torch.ones(2, 3, 8, 8)}], ids=["tuple", "dict"]
)
def test_describe_takes_positional_and_keyword_inputs(inputs: Any) -> None:
    assert len(FeatureFlow(ResidualNet(2)).describe(inputs).names) == 4


def test_describe_refuses_what_it_cannot_call() -> None:
    with pytest.raises(TypeError, match="example_inputs"):
        FeatureFlow(ResidualNet(2)).describe("image.png")
