"""Gradients just in time in every kind of backward pass, whoever looks at the gradients on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flow_models import ResidualNet, assert_gradients_close, expected, gradients, images, task_loss
from taps_models import Chain, by_hand, flow_of
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss

pytestmark = pytest.mark.usefixtures("fused")


# --- every kind of backward pass ------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_backward_twice_doubles_the_gradients(norm: str) -> None:
    model, x = ResidualNet(), images()
    with FeatureFlow(model, norm=norm, backend="cpu") as flow:
        loss = task_loss(model(x)) + flow.loss()
    once = gradients(model, Retained(loss))
    loss.backward()
    assert_gradients_close([p.grad for p in model.parameters()], [2 * g for g in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


class Retained:
    """A loss whose backward keeps the graph."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss

    def backward(self) -> None:
        self.loss.backward(retain_graph=True)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("order", ["task first", "penalty first", "together, then each"])
def test_the_two_losses_can_be_differentiated_apart(norm: str, order: str) -> None:
    model, x = ResidualNet(), images()
    logits, features = model.features(x)
    true_task = gradients(model, Retained(task_loss(logits)))
    true_penalty = gradients(model, ffr_loss(features, norm=norm, backend="cpu"))
    with FeatureFlow(model, norm=norm, backend="cpu") as flow:
        task, penalty = task_loss(model(x)), flow.loss()
    if order.startswith("together"):
        (task + penalty).backward(retain_graph=True)
    losses = [(penalty, true_penalty), (task, true_task)]
    for loss, truth in losses if order == "penalty first" else reversed(losses):
        assert_gradients_close(gradients(model, Retained(loss)), truth)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradients_of_some_parameters_by_autograd_grad(norm: str) -> None:
    """Only the nodes on the way to them run; what is left over must not reach a later pass."""
    model, x = ResidualNet(), images()
    with FeatureFlow(model, norm=norm, backend="cpu") as flow:
        loss = task_loss(model(x)) + 2 * flow.loss()
    logits, features = model.features(x)
    truth = task_loss(logits) + 2 * ffr_loss(features, norm=norm, backend="cpu")
    for parameters in (
        [model.late[1].conv.weight],
        [model.stem.weight, model.head.bias],
        [*model.parameters()],
    ):
        got = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert_gradients_close([*got], [*torch.autograd.grad(truth, parameters, retain_graph=True)])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_gradient_of_a_captured_feature_alone_and_with_parameters(norm: str) -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    kept: list[Tensor] = []
    model.layers[2].register_forward_hook(lambda _m, _a, output: kept.append(output))
    with flow_of(model, norm=norm) as flow:
        loss = model(x).sum() + flow.loss()
    features = model.features(x)
    truth = features[-1].sum() + ffr_loss(features, norm=norm, backend="cpu")
    weight = model.layers[0].weight
    expected_grads = torch.autograd.grad(truth, [features[2], weight])
    alone = torch.autograd.grad(loss, [kept[0]], retain_graph=True)
    both = torch.autograd.grad(loss, [kept[0], weight])
    torch.testing.assert_close(alone[0], expected_grads[0])
    torch.testing.assert_close(both, expected_grads)


def test_a_tensor_hook_on_a_feature_sees_the_whole_gradient() -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    seen: list[Tensor] = []
    model.layers[2].register_forward_hook(lambda _m, _a, output: output.register_hook(seen.append) and None)
    with flow_of(model) as flow:  # its hook comes after the one that looks
        (model(x).sum() + flow.loss()).backward()
    tapped_seen = seen.pop()
    features = model.features(x)
    (features[-1].sum() + ffr_loss(features, backend="cpu")).backward()
    torch.testing.assert_close(tapped_seen, seen[-1])


def test_a_loss_that_is_never_differentiated_costs_the_next_step_nothing() -> None:
    model, x = ResidualNet(), images()
    _, truth = expected(model, x, backend="cpu")
    with FeatureFlow(model, backend="cpu") as flow:
        model(x)
        flow.loss()
        assert_gradients_close(gradients(model, task_loss(model(x)) + flow.loss()), truth)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_double_backward_raises(norm: str) -> None:
    model, x = ResidualNet(), images()
    with FeatureFlow(model, norm=norm, backend="cpu") as flow:
        loss = task_loss(model(x)) + flow.loss()
    with pytest.raises(RuntimeError, match=r"create_graph=True.*second derivative"):
        torch.autograd.grad(loss, [*model.parameters()], create_graph=True)


def test_saved_tensor_hooks_see_what_is_saved() -> None:
    for norm, dtypes in (("l1", [torch.uint8]), ("l2", [torch.float64] * 5)):
        model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
        _, truth = by_hand(model, x, norm=norm)
        packed: list[Tensor] = []
        with flow_of(model, norm=norm) as flow:
            task = model(x).sum()
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, packed=packed: packed.append(tensor) or len(packed) - 1,
                lambda index, packed=packed: packed[index].clone(),
            ):
                penalty = flow.loss()
            # The features or the signs; the loss's own arithmetic saves only numbers per term.
            large = [t.dtype for t in packed if t.dtype == torch.uint8 or t.numel() == 4 * 3 * 5]
            assert large == dtypes
            assert_gradients_close(gradients(model, task + penalty), truth, 1e-13)


@pytest.mark.parametrize(("norm", "raises"), [("l1", False), ("l2", True)])
def test_a_feature_overwritten_between_loss_and_backward(norm: str, raises: bool) -> None:
    """The signs of l1 are a copy; the other norms need the values: autograd finds the change."""
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    kept: list[Tensor] = []
    model.layers[-1].change = lambda y: y * 1  # an output that no layer needs for its own backward
    model.layers[-1].register_forward_hook(lambda _m, _a, output: kept.append(output))
    _, truth = by_hand(model, x, norm=norm)
    kept.clear()
    with flow_of(model, norm=norm) as flow:
        task = model(x).sum()
        penalty = flow.loss()
    kept[0].mul_(3)
    if raises:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (task + penalty).backward()
    else:
        assert_gradients_close(gradients(model, task + penalty), truth, 1e-13)


# --- who looks at gradients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keeper", ["module hook", "node hook", "view in a node hook", "tensor hook", "later tensor hook"]
)
def test_a_gradient_that_somebody_keeps_is_not_changed(keeper: str) -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(grad: Tensor) -> None:
        grad = grad.view(-1) if keeper.startswith("view") else grad
        kept.append((grad, grad.clone()))

    def look(output: Tensor) -> None:
        if "node" in keeper:
            product = output.grad_fn.next_functions[0][0].next_functions[0][
                0
            ]  # tanh(feature * weight + bias)
            assert product.name().startswith("Mul")
            product.register_hook(lambda grads, _outputs: keep(grads[0]))
        elif keeper == "tensor hook":
            output.register_hook(keep)

    if keeper == "module hook":
        model.layers[3].register_full_backward_hook(lambda _m, grads, _outputs: keep(grads[0]))
    model.layers[3].register_forward_hook(lambda _m, _a, output: look(output))
    with flow_of(model) as flow:
        if keeper == "later tensor hook":
            model.layers[3].register_forward_hook(lambda _m, _a, output: output.register_hook(keep) and None)
        task = model(x).sum()
        grads = gradients(model, task + flow.loss())
    ((now, then),) = kept
    assert type(now) is Tensor
    torch.testing.assert_close(now, then, rtol=0, atol=0)
    _, true_grads = by_hand(model, x)
    assert_gradients_close(grads, true_grads, 1e-13)


class Branches(nn.Module):
    """Features side by side: with the penalty alone no gradient arrives from above."""

    class Double(torch.autograd.Function):
        """A kernel of the user's own, which reads its gradient by address."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            assert type(grad) is Tensor
            assert grad.data_ptr() != 0
            return grad * 2

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(6, dtype=torch.float64)) for _ in range(4))
        self.layers = nn.ModuleList(nn.Identity() for _ in range(4))

    def features(self, x: Tensor) -> list[Tensor]:
        return [layer(self.Double.apply(x * w)) for layer, w in zip(self.layers, self.weights, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(self.features(x)).sum(0)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_only_gradient_of_a_feature_is_an_ordinary_tensor(norm: str) -> None:
    model, x = Branches(), torch.randn(4, 6, dtype=torch.float64)
    truth = gradients(model, ffr_loss(model.features(x), norm=norm, backend="cpu"))
    with flow_of(model, norm=norm) as flow:
        model(x)
        assert_gradients_close(gradients(model, flow.loss()), truth, 1e-13)
    assert all(type(p.grad) in (Tensor, nn.Parameter) for p in model.parameters())


def test_anomaly_mode() -> None:
    model, x = Chain(), torch.randn(4, 3, 5, dtype=torch.float64)
    _, truth = by_hand(model, x)
    with flow_of(model) as flow, torch.autograd.detect_anomaly(check_nan=True):
        assert_gradients_close(gradients(model, model(x).sum() + flow.loss()), truth, 1e-13)
