"""A pass by hand: which calls leave no trace, what layers outside any call make, what is left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_models import (
    Calls,
    ResidualNet,
    Tower,
    assert_gradients_close,
    gradients,
    hooks,
    images,
    make_flow,
    one_pass,
    outputs,
    penalty,
    views,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ffr_ext import FeatureFlow, ffr_loss

LAYERS = [f"layers.{index}" for index in range(4)]


# --- calls that do not count ----------------------------------------------------------------------

ASIDE: dict[str, Any] = {
    "eval": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def aside(model: nn.Module, how: str, x: Tensor) -> None:
    """A call that is not one of training."""
    model.train(how != "eval")
    with ASIDE[how]():
        model(x)
    model.train()


@pytest.mark.parametrize("how", ASIDE)
def test_a_teacher_and_an_evaluation_leave_no_trace(how: str, backend: str) -> None:
    model, (first, second) = Tower(), views()
    truth = penalty(model, first, backend=backend)
    true_gradients = gradients(model, truth)
    with FeatureFlow(model, backend=backend) as flow:
        with one_pass(flow):
            aside(model, how, second)
            model(first)
            aside(model, how, second)
        assert len(flow.captured()) == 4
        loss = flow.loss()
        torch.testing.assert_close(loss, truth)
        assert_gradients_close(gradients(model, loss), true_gradients)


@pytest.mark.parametrize("how", ASIDE)
def test_nothing_but_such_calls_is_an_error_never_a_zero(how: str) -> None:
    model = Tower()
    with make_flow(model) as flow:
        with one_pass(flow):
            aside(model, how, views()[0])
        with pytest.raises(
            RuntimeError, match=r"no forward pass was recorded(.|\n)*eval mode or under no_grad"
        ):
            flow.loss()


def test_they_are_calls_like_others_when_asked() -> None:
    model, (first, second) = Tower(), views()
    with make_flow(model, capture_eval=True) as flow:
        with one_pass(flow):
            model(first)
            aside(model, "no_grad", second)
        torch.testing.assert_close(flow.loss(), penalty(model, first, second))


class Fuse(nn.Module):
    """Raises while it is blown."""

    blown = False

    def forward(self, x: Tensor) -> Tensor:
        if self.blown:
            raise ArithmeticError
        return x


@pytest.mark.parametrize("where", ["model", "stack"])
def test_a_call_that_raised_leaves_no_trace(where: str) -> None:
    stack = nn.Sequential(nn.Linear(4, 4), Fuse(), nn.Linear(4, 4))
    model = Calls(lambda self, x: self.stack(x), stack=stack)
    call = model if where == "model" else stack
    x = torch.randn(3, 4)
    truth = ffr_loss(outputs([stack[0], stack[2]], x), backend="reference")

    def fail() -> None:
        stack[1].blown = True
        with pytest.raises(ArithmeticError):
            call(x)
        stack[1].blown = False

    with make_flow(model, ["stack.0", "stack.2"]) as flow:
        with one_pass(flow):
            fail()
            call(x)
            fail()
            call(x)
        torch.testing.assert_close(flow.loss(), 2 * truth)
        with one_pass(flow):
            fail()
        with pytest.raises(RuntimeError, match="did not finish"):
            flow.loss()
        flow.begin_pass()  # a step that raised: nobody ended its pass
        fail()
        with one_pass(flow):
            call(x)
        torch.testing.assert_close(flow.loss(), truth)


def test_a_call_tried_again_while_an_error_is_handled_counts() -> None:
    """Also if the model returns nothing: only an exception that came during the call is the call's own."""
    stack = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self: Any, x: Tensor) -> None:
        self.kept = self.stack(x)

    model, (x, y) = Calls(forward, stack=stack), torch.randn(2, 3, 4)
    truth = sum(ffr_loss(outputs(stack, each), backend="reference") for each in (x, y))
    with make_flow(model, ["stack.0", "stack.1"]) as flow:
        with one_pass(flow):
            model(x)
            try:
                raise ConnectionError
            except ConnectionError:
                model(y)
        torch.testing.assert_close(flow.loss(), truth)


class CheckpointedTower(Tower):
    """Recomputes every layer, or all of them at once, in the backward pass."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        for part in [self.layers] if self.whole else self.layers:
            x = checkpoint(part, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("early_stop", [True, False], ids=["until it has all", "to the end"])
@pytest.mark.parametrize("whole", [False, True], ids=["each layer", "the stack"])
def test_recomputation_inside_the_pass_is_no_call(whole: bool, early_stop: bool, backend: str) -> None:
    model, (first, second) = CheckpointedTower(whole), views()
    truth = penalty(model, first, second, backend=backend)
    true_gradients = gradients(model, truth)
    with FeatureFlow(model, backend=backend) as flow, set_checkpoint_early_stop(early_stop):
        with one_pass(flow):
            model(first)
            model(first.clone()).sum().backward()  # of a part of the step, before the rest of it runs
            model(second)
        assert len(flow.captured()) == 3 * 4
        flow.loss()
        with one_pass(flow):
            model(first)
            model(second)
        loss = flow.loss()
        torch.testing.assert_close(loss, truth)
        assert_gradients_close(gradients(model, loss), true_gradients)


# --- layers outside any call ----------------------------------------------------------------------


def test_a_pass_by_hand_spans_several_calls_and_submodules() -> None:
    model = ResidualNet(2)
    _, features = model.features(images())
    with FeatureFlow(model, backend="reference") as flow:
        flow.begin_pass()
        assert flow.in_pass
        x = model.early(model.stem(images()))
        model.late(model.down(x))
        flow.end_pass()
        assert not flow.in_pass
        torch.testing.assert_close(flow.loss(), ffr_loss(features, backend="reference"))


def test_what_no_call_contains_is_one_path_beside_the_calls() -> None:
    model, (first, second) = Tower(), views()
    with make_flow(model) as flow:
        with one_pass(flow):
            x = model.layers[1](model.layers[0](first))
            model(second)
            model.layers[3](model.layers[2](x))
        assert [name for name, _ in flow.captured()] == LAYERS * 2
        torch.testing.assert_close(flow.loss(), penalty(model, first, second))


@pytest.mark.parametrize("depend", [True, False])
def test_several_rounds_outside_any_call_warn_and_are_one_path_where_they_depend_on_each_other(
    depend: bool,
) -> None:
    model, x = Tower(), views()[0]
    with make_flow(model) as flow:
        with one_pass(flow):
            outputs(model.layers, x)
        flow.begin_pass()
        first = outputs(model.layers, x)
        second = outputs(model.layers, first[-1] if depend else x + 1)
        with pytest.warns(UserWarning, match="all 4 layers were called 2 times in one pass"):
            flow.end_pass()
        rounds = [first + second] if depend else [first, second]
        truth = sum(ffr_loss(features, backend="reference") for features in rounds)
        torch.testing.assert_close(flow.loss(), truth)


def test_layers_without_autograd_outside_any_call_are_an_error() -> None:
    model = Tower()
    with make_flow(model) as flow:
        with one_pass(flow), torch.no_grad():
            outputs(model.layers, views()[0])
        with pytest.raises(RuntimeError, match=r"'layers\.0'.*without autograd"):
            flow.loss()


# --- what is left behind --------------------------------------------------------------------------


def test_the_hooks_that_tell_calls_apart_come_with_the_first_pass_by_hand_and_go_with_the_others() -> None:
    model = Tower()
    flow = make_flow(model).attach()
    ordinary = hooks(model)
    for _ in range(2):
        with one_pass(flow):
            model(views()[0])
        assert hooks(model) == ordinary + 2  # of its stack of layers
    flow.begin_pass()
    model(views()[0])
    flow.detach()
    assert hooks(model) == 0
    assert not flow.in_pass
    flow.attach()
    assert hooks(model) == ordinary
    with one_pass(flow):
        model(views()[0])
    assert hooks(model) == ordinary + 2
    del flow
    gc.collect()
    assert hooks(model) == 0


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_model_can_be_copied_inside_a_pass(copier: Callable[[nn.Module], nn.Module]) -> None:
    model, (first, second) = Tower(), views()
    with make_flow(model) as flow:
        with one_pass(flow):
            model(first)
            copier(model)(second)  # the copy feeds nobody
        torch.testing.assert_close(flow.loss(), penalty(model, first))


def test_a_flow_copied_inside_a_pass_counts_the_calls_of_its_own_model() -> None:
    model = Tower()
    model.__dict__["flow"] = make_flow(model).attach()
    model.flow.begin_pass()
    twin = copy.deepcopy(model)
    first, second = views()
    with twin.flow:
        with one_pass(twin.flow):
            twin(first)
            twin(second)
        torch.testing.assert_close(twin.flow.loss(), penalty(twin, first, second))


def test_features_are_released_step_by_step() -> None:
    model = Tower()
    alive: list[weakref.ref[Tensor]] = []
    model.layers[1].register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    with make_flow(model) as flow:
        for _ in range(3):
            with one_pass(flow):
                task = sum(model(x).sum() for x in views())
            (task + flow.loss()).backward()
            del task
        assert len(alive) == 6
        assert [reference() for reference in alive] == [None] * 6
