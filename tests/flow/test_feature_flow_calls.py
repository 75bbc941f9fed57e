"""A pass by hand: each call of the model in it is a path of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_models import (
    Calls,
    Tower,
    assert_gradients_close,
    gradients,
    make_flow,
    one_pass,
    outputs,
    penalty,
    views,
)
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss, flow_terms

LAYERS = [f"layers.{index}" for index in range(4)]


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
