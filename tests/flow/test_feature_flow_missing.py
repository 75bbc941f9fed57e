"""Layers that a forward leaves out, passes without a loss, and penalties that belong to one of several losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_models import Tower, assert_gradients_close, gradients, make_flow, one_pass, outputs, penalty, views
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss
from ffr_ext.flow.paths import reached
from ffr_ext.schedules import WeightSchedule


class Skipping(Tower):
    """Calls only some of its layers."""

    which: tuple[int, ...] = (0, 1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        for index in self.which:
            x = self.layers[index](x)
        return self.head(x)


# --- layers that did not run ----------------------------------------------------------------------


@pytest.mark.parametrize("by_hand", [False, True], ids=["a call", "a pass by hand"])
@pytest.mark.parametrize("which", [(0, 2, 3), (1, 2), (0,), ()], ids=str)
def test_skipped_layers_are_left_out_of_the_differences(
    which: tuple[int, ...], by_hand: bool, backend: str
) -> None:
    model, (x, _) = Skipping(), views()
    with FeatureFlow(model, backend=backend, missing="skip") as flow:
        model(x)  # all of them, as most steps do
        flow.loss()
        model.which = which
        features = outputs([model.layers[index] for index in which], x)
        truth = ffr_loss(features, backend=backend) if len(which) > 1 else torch.zeros(())
        true_gradients = gradients(model, model(x).square().mean() + truth)
        if by_hand:
            with one_pass(flow):
                task = model(x).square().mean()
        else:
            task = model(x).square().mean()
        loss = flow.loss()
        torch.testing.assert_close(loss, truth)
        assert_gradients_close(gradients(model, task + loss), true_gradients)
        assert len(flow.terms().gradient) == max(len(which) - 1, 0)


def test_layer_drop_trains() -> None:
    model, (x, _) = Skipping(), views()
    generator = torch.Generator().manual_seed(0)
    with make_flow(model, missing="skip") as flow:
        for _ in range(50):
            model.which = tuple(i for i in range(4) if torch.rand((), generator=generator) > 0.4)
            (model(x).square().mean() + flow.loss()).backward()


def test_a_missing_layer_is_an_error_with_the_advice() -> None:
    model = Skipping()
    model.which = (0, 1, 3)
    with make_flow(model) as flow:
        model(views()[0])
        with pytest.raises(
            RuntimeError, match=r"'layers\.2' not called.*missing='skip'.*layers=.*torch\.compile"
        ):
            flow.loss()


def test_skipping_does_not_hide_hooks_that_are_never_called() -> None:
    model = Skipping()
    model.which = ()
    with make_flow(model, missing="skip") as flow:
        model(views()[0])
        with pytest.raises(RuntimeError, match="not called"):
            flow.loss()


def test_missing_is_raise_or_skip() -> None:
    with pytest.raises(ValueError, match=r"missing: expected .*'raise'.*'skip'"):
        FeatureFlow(Tower(), missing="ignore")


# --- a log call is no place to die ----------------------------------------------------------------


def test_terms_of_a_disabled_flow_are_those_of_the_last_pass_or_none() -> None:
    model, (x, _) = Tower(), views()
    with make_flow(model) as flow:
        schedule = WeightSchedule(flow, wait=1, stop=2)
        assert [len(values) for values in flow.terms()] == [0, 0]
        schedule.step()
        model(x)
        flow.loss()
        last = flow.terms()
        schedule.step()
        model(x)
        for values, truth in zip(flow.terms(), last, strict=True):
            assert torch.equal(values, truth)


def test_an_enabled_flow_without_a_pass_still_says_so() -> None:
    with make_flow(Tower()) as flow, pytest.raises(RuntimeError, match="no forward pass was recorded"):
        flow.terms()


# --- scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight", [2.0, [1.0, 0.0, 2.0], torch.tensor([1.0, 0.0, 2.0])], ids=["float", "list", "tensor"]
)
def test_scale_multiplies_both_weights(weight: Any, backend: str) -> None:
    model, (x, _) = Tower(), views()
    truth = penalty(model, x, gradient=weight, curvature=3.0, backend=backend)
    with FeatureFlow(model, gradient=weight, curvature=3.0, backend=backend) as flow:
        flow.scale = 0.25
        model(x)
        torch.testing.assert_close(flow.loss(), 0.25 * truth)


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), ValueError), ("1", TypeError), (True, TypeError)]
)
def test_scale_is_a_finite_float(value: Any, error: type[Exception]) -> None:
    flow = FeatureFlow(Tower())
    with pytest.raises(error, match="scale: expected a"):
        flow.scale = value
    assert flow.scale == 1


def test_gradients_of_features_cannot_be_added_afterwards() -> None:
    with pytest.raises(RuntimeError, match=r"add loss\(\) to the loss"):
        FeatureFlow(Tower()).add_gradients_()


# --- the penalty of one of several losses ---------------------------------------------------------


def test_a_loss_gets_the_penalty_of_the_calls_it_depends_on(backend: str) -> None:
    model, (x, y) = Tower(), views()
    truths = {}
    for inputs in (x, y):
        truth = penalty(model, inputs, backend=backend)
        truths[inputs] = truth.detach(), gradients(model, model(inputs).square().mean() + truth)
    with FeatureFlow(model, backend=backend) as flow:
        flow.begin_pass()
        first, second, _ = model(x), model(y), model(x + 1)
        for output, inputs in ((second, y), (first, x)):
            loss = flow.loss_for(output.square().mean())
            assert loss is not None
            truth, true_gradients = truths[inputs]
            torch.testing.assert_close(loss.detach(), truth)
            assert_gradients_close(gradients(model, output.square().mean() + loss), true_gradients)
        assert flow.loss_for(torch.zeros((), requires_grad=True) * 2, required=False) is None
        with pytest.raises(RuntimeError, match="depends on none of the recorded forward passes"):
            flow.loss_for(torch.zeros((), requires_grad=True) * 2)
        flow.after_backward()
        assert flow._recorder.features == []


def test_a_graph_that_is_differentiated_twice_gets_its_penalty_once_for_each_gradient() -> None:
    model, (x, _) = Tower(), views()
    with make_flow(model) as flow:
        flow.begin_pass()
        output = model(x)
        task = output.square().mean()
        first = flow.loss_for(task)
        assert first is not None
        (task + first).backward(retain_graph=True)
        assert flow.loss_for(output.mean()) is None  # the gradient of the penalty is there
        model.zero_grad()
        assert flow.loss_for(output.mean()) is first
        model.zero_grad(set_to_none=False)
        assert flow.loss_for(output.mean()) is first


def test_what_runs_outside_any_call_starts_anew_after_a_backward_pass() -> None:
    model, (x, y) = Tower(), views()
    truths = [penalty(model, inputs) for inputs in (x, y)]
    with make_flow(model) as flow:
        flow.begin_pass()
        for inputs, truth in zip((x, y), truths, strict=True):
            features = outputs(model.layers, inputs)
            loss = flow.loss_for(features[-1].mean())
            torch.testing.assert_close(loss, truth)
        flow.end_pass()


def test_features_are_let_go_when_the_penalty_is_built() -> None:
    model, (x, _) = Tower(), views()
    with make_flow(model) as flow:
        flow.begin_pass()
        flow.loss_for(model(x).mean())
        assert flow._recorder.features == []


def test_the_graph_is_walked_no_further_than_to_the_nearest_feature_of_each_call() -> None:
    """A step of a deep network must not pay for the depth of its graph."""
    deep = nn.Sequential(*(nn.Tanh() for _ in range(500)))
    model, (x, _) = Tower(), views()
    with make_flow(model) as flow:
        flow.begin_pass()
        task = model(deep(x.requires_grad_())).mean()
        wanted = [path.nodes() for path in flow._recorder.paths]
        walked: list[Any] = []

        class Counted(set[Any]):
            def isdisjoint(self, nodes: Any) -> bool:
                walked.extend(nodes)
                return super().isdisjoint(nodes)

        assert reached(task, [Counted(nodes) for nodes in wanted]) == [True]
        assert len(walked) < 20
        assert reached(torch.ones((), requires_grad=True) * 2, wanted) == [False]
