"""A pass by hand: each call of the model in it is a path of its own; what is no training call leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
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
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from ffr_ext import FeatureFlow, ffr_loss, flow_terms

LAYERS = [f"layers.{index}" for index in range(4)]


@contextlib.contextmanager
def one_pass(flow: FeatureFlow, **options: Any) -> Iterator[None]:
    """begin_pass() ... end_pass(), in which nothing is to warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.begin_pass(**options)
        yield
        flow.end_pass()


def views() -> tuple[Tensor, Tensor]:
    x, _ = Tower.data()
    return x, x[:7] + 0.3 * torch.randn(7, x.shape[1])


def outputs(layers: Any, x: Tensor) -> list[Tensor]:
    """What each of the layers makes of what the one before it made."""
    features = []
    for layer in layers:
        features.append(x := layer(x))
    return features


def penalty(model: Any, *inputs: Tensor, **options: Any) -> Tensor:
    """The sum of ffr_loss over the inputs, without any hook."""
    total = torch.zeros(())
    for x in inputs:
        total = total + ffr_loss(outputs(model.layers, x), **{"backend": "reference", **options})
    return total


def two_linear() -> Calls:
    return Calls(lambda self, x: self.b(self.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))


# --- each call is a path --------------------------------------------------------------------------

CALLS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "the model": lambda wrapper, x: wrapper(x),
    "a module inside": lambda wrapper, x: wrapper.net(x),
    "the stack of blocks": lambda wrapper, x: wrapper.net.head(wrapper.net.layers(x)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("options", [{}, {"norm": "l2", "gradient": 3.0, "curvature": [0.5, 2.0]}], ids=str)
def test_two_views_give_the_sum_of_their_penalties(
    call: Callable[[Any, Tensor], Tensor], options: dict[str, Any], backend: str
) -> None:
    wrapper = Calls(lambda self, x: self.net(x), net=Tower())
    net, (first, second) = wrapper.net, views()
    options = {"backend": backend, **options}
    truth = penalty(net, first, second, **options)
    task = net(first).square().mean() + net(second).square().mean()
    true_gradients = gradients(wrapper, task + truth)
    with FeatureFlow(wrapper, **options) as flow:
        for _ in range(2):
            with one_pass(flow):
                task = call(wrapper, first).square().mean() + call(wrapper, second).square().mean()
            loss = flow.loss()
            torch.testing.assert_close(loss, truth)
            assert_gradients_close(gradients(wrapper, task + loss), true_gradients)


def test_features_and_terms_come_one_call_after_another(backend: str) -> None:
    model, (first, second) = Tower(), views()
    features = [outputs(model.layers, x) for x in (first, second)]
    truths = [flow_terms(each, backend=backend) for each in features]
    with FeatureFlow(model, backend=backend) as flow:
        with one_pass(flow):
            model(first)
            model(second)
        captured = flow.captured()
        before = flow.terms()
        flow.loss()
        after = flow.terms()
    assert [name for name, _ in captured] == LAYERS * 2
    for (_, feature), truth in zip(captured, features[0] + features[1], strict=True):
        torch.testing.assert_close(feature, truth)
    for terms in (before, after):
        torch.testing.assert_close(terms.gradient, torch.cat([truth.gradient for truth in truths]).detach())
        torch.testing.assert_close(terms.curvature, torch.cat([truth.curvature for truth in truths]).detach())


def test_a_call_inside_a_call_is_a_part_of_it() -> None:
    """The recurrent step of a module is one path, whether the pass is by hand or not."""
    model = Calls(lambda self, x: self.cell(self.cell(x)), cell=nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    x = torch.randn(3, 4)
    features = []
    for _ in range(2):
        y = features[-1] if features else x
        features += [model.cell[0](y), model.cell(y)]
    truth = ffr_loss(features, backend="reference")
    with FeatureFlow(model, ["cell.0", "cell.1"], backend="reference") as flow:
        with one_pass(flow):
            model(x)
        torch.testing.assert_close(flow.loss(), truth)
        model(x)
        torch.testing.assert_close(flow.loss(), truth)
        with one_pass(flow):  # and two calls of the cell alone are two paths
            model.cell(x)
            model.cell(x)
        torch.testing.assert_close(flow.loss(), 2 * ffr_loss(features[:2], backend="reference"))


def test_a_module_under_two_names_is_a_call_under_both() -> None:
    net = two_linear()
    model = Calls(lambda self, x: self.net(x), a=net.a, b=net.b, net=net)  # the layers are 'a' and 'b' here
    x = torch.randn(3, 4)
    truth = 2 * ffr_loss([net.a(x), net(x)], backend="reference")
    with FeatureFlow(model, ["a", "b"], backend="reference") as flow:
        with one_pass(flow):
            net(x)
            net(x)
        torch.testing.assert_close(flow.loss(), truth)


def test_one_layer_called_more_than_once_is_a_path_for_each_call_of_its_parent() -> None:
    model = Calls(lambda self, x: self.cell(self.cell(x)), cell=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    truth = ffr_loss([model.cell(x), model(x)], backend="reference")
    with FeatureFlow(model, "cell", backend="reference") as flow:
        with one_pass(flow):
            model(x)
            model(x)
        torch.testing.assert_close(flow.loss(), 2 * truth)
        with one_pass(flow):
            model.cell(model.cell(x))  # without a call of the parent
        torch.testing.assert_close(flow.loss(), truth)


def test_afterwards_a_call_of_the_model_is_a_pass_again() -> None:
    model, (first, second) = Tower(), views()
    with make_flow(model) as flow:
        with one_pass(flow):
            model(first)
        model(second)
        torch.testing.assert_close(flow.loss(), penalty(model, second))


def test_a_pass_within_one_call_of_the_model_has_the_calls_inside_it() -> None:
    """DistributedDataParallel runs the step of a LightningModule so."""

    step = Calls(lambda self, inputs: [self.net(x) for x in inputs], net=Tower())
    with make_flow(step) as flow:
        with one_pass(flow, within_forward=True):
            step(inputs := views())
        torch.testing.assert_close(flow.loss(), penalty(step.net, *inputs))


def test_a_pass_begun_inside_a_call_has_the_calls_that_follow_in_it() -> None:
    def forward(self: Any, x: Tensor) -> None:
        flow.begin_pass()
        self.net(x)
        self.net(x)

    step, (first, second) = Calls(forward, net=Tower()), views()
    with make_flow(step) as flow:
        with one_pass(flow):
            step(first)
            step.net.layers(second)
            step.net.layers(second)
        torch.testing.assert_close(flow.loss(), penalty(step.net, first, first, second, second))


# --- calls of different layers --------------------------------------------------------------------


class Branching(nn.Module):
    """Calls some of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, *which: int) -> Tensor:
        for index in which:
            x = self.layers[index](x)
        return x

    def features(self, x: Tensor, *which: int) -> list[Tensor]:
        return outputs([self.layers[index] for index in which], x)


def test_calls_may_use_different_layers() -> None:
    model, x = Branching(), torch.randn(3, 4)
    truth = ffr_loss(model.features(x, 0, 1, 2), backend="reference")
    truth = truth + ffr_loss(model.features(x, 0, 2), backend="reference")
    with make_flow(model, list(model.layers)) as flow:
        with one_pass(flow):
            model(x, 0, 1, 2)
            model(x, 0, 2)
        torch.testing.assert_close(flow.loss(), truth)


@pytest.mark.parametrize("transition", ["break", "pool"])
def test_a_call_without_a_term_adds_nothing(transition: str) -> None:
    model, x = Branching(), torch.randn(3, 4)
    truth = flow_terms(model.features(x, 0, 1, 2), backend="reference")
    with make_flow(model, list(model.layers), transition=transition) as flow:
        with one_pass(flow):
            model(x)
            model(x, 1)
            model(x, 0, 1, 2)
        torch.testing.assert_close(flow.terms().gradient, truth.gradient.detach())
        torch.testing.assert_close(flow.loss(), truth.gradient.sum() + truth.curvature.sum())


def test_calls_of_which_none_has_a_term_are_an_error() -> None:
    model, x = Branching(), torch.randn(3, 4)
    with make_flow(model, list(model.layers)) as flow:
        with one_pass(flow):
            for index in range(3):
                model(x, index)
        with pytest.raises(ValueError, match="two features"):
            flow.loss()


def test_a_layer_that_no_call_used_is_an_error_that_names_it() -> None:
    model, x = Branching(), torch.randn(3, 4)
    with make_flow(model, list(model.layers)) as flow:
        with one_pass(flow):
            model(x, 0)
            model(x, 0, 1)
        with pytest.raises(RuntimeError, match=r"layer 'layers\.2' not called"):
            flow.loss()


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


def test_several_rounds_outside_any_call_warn_that_they_make_one_path() -> None:
    model, (first, second) = Tower(), views()
    with make_flow(model) as flow:
        with one_pass(flow):
            outputs(model.layers, first)
        flow.begin_pass()
        features = outputs(model.layers, first) + outputs(model.layers, second)
        with pytest.warns(UserWarning, match="all 4 layers were called 2 times in one pass"):
            flow.end_pass()
        torch.testing.assert_close(flow.loss(), ffr_loss(features, backend="reference"))


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
        assert hooks(model) == ordinary + 2 * 2  # of the model and of its stack of layers
    flow.begin_pass()
    model(views()[0])
    flow.detach()
    assert hooks(model) == 0
    assert not flow.in_pass
    flow.attach()
    assert hooks(model) == ordinary
    with one_pass(flow):
        model(views()[0])
    assert hooks(model) == ordinary + 2 * 2
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
