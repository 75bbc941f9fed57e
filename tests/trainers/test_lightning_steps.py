"""FFRCallback in the steps that people write: GANs, closures, several backward passes; each equals a plain loop."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

lightning = pytest.importorskip("lightning", reason="needs ffr-ext[lightning]")

from lightning.pytorch.plugins.precision import Precision  # noqa: E402
from lightning_models import GAN, WEIGHTS, Net, WithLBFGS, assert_same, batches, fit  # noqa: E402

from ffr_ext import FeatureFlow  # noqa: E402
from ffr_ext.trainers import FFRCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning")


# --- a GAN ----------------------------------------------------------------------------------------

ORDERS = [
    "discriminator first",
    "generator first",
    "one fake",
    "one fake, differentiated twice",
    "frozen in turn",
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("modules", ["g", "d", "gd"])
def test_each_network_of_a_gan_gets_its_penalty_in_its_own_step(order: str, modules: str) -> None:
    module = GAN(order)
    truth, without = module.plainly(modules), module.plainly("")
    fit(module, *(FFRCallback(module=name, **WEIGHTS) for name in modules))
    assert_same(module, truth)
    for name in modules:
        assert not torch.allclose(getattr(module, name).stem.weight, getattr(without, name).stem.weight)


def test_both_networks_of_a_module_are_paths_of_their_own() -> None:
    module = GAN("discriminator first")
    truth = module.plainly("gd")
    callback = FFRCallback(**WEIGHTS)
    fit(module, callback)
    assert callback.flow is not None
    assert [path[0] for path in callback.flow.paths] == ["g.blocks.0", "d.blocks.0"]
    assert_same(module, truth)


def test_two_callbacks_keep_their_states_and_logs_apart(tmp_path: Path) -> None:
    def callbacks() -> list[FFRCallback]:
        return [
            FFRCallback(module="g", schedule={"ramp": 4}, **WEIGHTS),
            FFRCallback(module="d", schedule={"ramp": 8}, **WEIGHTS),
        ]

    start = GAN("discriminator first")
    whole, first, second = (copy.deepcopy(start) for _ in range(3))
    fit(whole, *callbacks(), max_epochs=2)
    trainer = fit(first, *callbacks())
    assert {"ffr/g/penalty", "ffr/d/penalty", "ffr/g/factor", "ffr/d/factor"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    states = torch.load(tmp_path / "run.ckpt", weights_only=False)["callbacks"]
    assert {"FFRCallback[g]", "FFRCallback[d]"} <= set(states)
    fit(second, *callbacks(), max_epochs=2, ckpt_path=tmp_path / "run.ckpt")
    assert_same(second, whole)


# --- closures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("automatic", [True, False], ids=["automatic", "manual"])
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_every_call_of_a_closure_has_the_same_objective(line_search: str | None, automatic: bool) -> None:
    module = WithLBFGS(line_search, automatic)
    truth = module.plainly()
    fit(module, FFRCallback(**WEIGHTS))
    assert_same(module, truth)


def test_the_step_of_an_optimizer_is_its_own_again_afterwards() -> None:
    module = WithLBFGS(None, True)
    trainer = fit(module, FFRCallback(**WEIGHTS))
    assert trainer.optimizers[0].step.__func__ is torch.optim.LBFGS(module.parameters()).step.__func__
    assert "backward" not in vars(module)


# --- manual optimisation --------------------------------------------------------------------------

Step = Callable[[Any, Any, Any, Any, Any], None]


class Manual(lightning.LightningModule):
    """A step of manual optimisation, and the same with penalties by hand."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.net, self.step, self.automatic_optimization = Net(), step, False

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05)

    def training_step(self, batch: Any, index: int) -> None:
        self.step(batch, index, self.optimizers(), self.manual_backward, lambda x: (self.net(x), 0.0))

    def plainly(self) -> Manual:
        twin = copy.deepcopy(self)
        optimizer = twin.configure_optimizers()
        for index, batch in enumerate(batches()):
            twin.step(batch, index, optimizer, lambda loss, **kwargs: loss.backward(**kwargs), twin.net.run)
        return twin


def of_loss(function: Callable[[Tensor], Tensor]) -> Step:
    def step(batch: Any, index: int, optimizer: Any, backward: Any, call: Any) -> None:
        optimizer.zero_grad()
        answer, penalty = call(batch[0])
        backward(function((answer - 1).square().mean()) + penalty)
        optimizer.step()

    return step


def two_losses_of_one_graph(batch: Any, index: int, optimizer: Any, backward: Any, call: Any) -> None:
    optimizer.zero_grad()
    answer, penalty = call(batch[0])
    backward(answer.mean() + penalty, retain_graph=True)
    backward(answer.square().mean())
    optimizer.step()


def two_losses_with_two_steps_worth_of_gradients(
    batch: Any, index: int, optimizer: Any, backward: Any, call: Any
) -> None:
    """The first gradient is looked at and dropped."""
    optimizer.zero_grad(set_to_none=False)
    answer, penalty = call(batch[0])
    backward(answer.mean() + penalty, retain_graph=True)
    optimizer.zero_grad(set_to_none=index == 0)
    backward(answer.square().mean() + penalty)
    optimizer.step()


def two_forwards(batch: Any, index: int, optimizer: Any, backward: Any, call: Any) -> None:
    optimizer.zero_grad()
    for x in (batch[0], batch[0].flip(0)):
        answer, penalty = call(x)
        backward(answer.square().mean() + penalty)
    optimizer.step()


def gradient_penalty(batch: Any, index: int, optimizer: Any, backward: Any, call: Any) -> None:
    """Of the task, as in WGAN-GP and R1: the graph is differentiated twice, and the penalty once."""
    optimizer.zero_grad()
    x = batch[0].clone().requires_grad_()
    answer, penalty = call(x)
    (slope,) = torch.autograd.grad(answer.sum(), x, create_graph=True)
    backward(slope.square().sum() + answer.mean() + penalty)
    optimizer.step()


def sam(batch: Any, index: int, optimizer: Any, backward: Any, call: Any) -> None:
    """Sharpness-aware minimisation: the gradient at a point uphill."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def gradient() -> None:
        optimizer.zero_grad()
        answer, penalty = call(batch[0])
        backward(nn.functional.cross_entropy(answer, batch[1]) + penalty)

    gradient()
    uphill = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in parameters]
    with torch.no_grad():
        torch._foreach_add_(parameters, uphill)
    gradient()
    with torch.no_grad():
        torch._foreach_sub_(parameters, uphill)
    optimizer.step()


STEPS: dict[str, Step] = {
    "mse": of_loss(lambda mse: mse),
    "rmse": of_loss(torch.sqrt),
    "exp": of_loss(torch.exp),
    "tanh": of_loss(torch.tanh),
    "sigmoid": of_loss(torch.sigmoid),
    "unbind": of_loss(lambda mse: torch.stack([mse, mse]).unbind()[0]),
    "split": of_loss(lambda mse: torch.stack([mse, mse]).split(1)[1]),
    "two losses of one graph": two_losses_of_one_graph,
    "two gradients of one graph": two_losses_with_two_steps_worth_of_gradients,
    "two forwards": two_forwards,
    "SAM": sam,
    "gradient penalty": gradient_penalty,
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_steps_by_hand_are_those_of_a_plain_loop(step: Step) -> None:
    module = Manual(step)
    truth = module.plainly()
    fit(module, FFRCallback(**WEIGHTS))
    assert_same(module, truth)


def test_a_loss_of_several_elements_is_refused() -> None:
    def step(batch: Any, index: int, optimizer: Any, backward: Any, call: Any) -> None:
        backward(call(batch[0])[0][:, 0], gradient=torch.ones(4))

    with pytest.raises(ValueError, match="expected a loss of one element for manual_backward"):
        fit(Manual(step), FFRCallback(**WEIGHTS))


def test_a_backward_pass_past_the_trainer_warns() -> None:
    def step(batch: Any, index: int, optimizer: Any, backward: Any, call: Any) -> None:
        optimizer.zero_grad()
        call(batch[0])[0].mean().backward()
        optimizer.step()

    with pytest.warns(UserWarning, match=r"call self\.manual_backward\(loss\) instead"):
        fit(Manual(step), FFRCallback(**WEIGHTS))


def test_a_network_that_no_backward_pass_reaches_warns() -> None:
    def step(batch: Any, index: int, optimizer: Any, backward: Any, call: Any) -> None:
        optimizer.zero_grad()
        call(batch[0])
        backward(optimizer.param_groups[0]["params"][0].sum())
        optimizer.step()

    with pytest.warns(UserWarning, match="no backward pass of this epoch had a penalty of the network 'net'"):
        fit(Manual(step), FFRCallback(module="net", **WEIGHTS))


def test_nothing_warns_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "FFRCallback.*")
        fit(GAN("discriminator first"), FFRCallback(module="g", **WEIGHTS))


# --- automatic optimisation -----------------------------------------------------------------------


class Automatic(lightning.LightningModule):
    def __init__(self, loss: Callable[[Tensor], Tensor] = torch.sqrt) -> None:
        super().__init__()
        self.net, self.loss = Net(), loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return self.loss((self.net(batch[0]) - 1).square().mean())


def accumulated(module: Automatic, clip: float) -> Automatic:
    """The same in a plain loop: two micro-batches a step, gradients clipped."""
    twin = copy.deepcopy(module)
    optimizer = twin.configure_optimizers()
    for index, (x, _) in enumerate(batches(2)):
        answer, penalty = twin.net.run(x)
        ((twin.loss((answer - 1).square().mean()) + penalty) / 2).backward()
        if index % 2:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return twin


def test_accumulation_and_clipping_are_those_of_a_plain_loop() -> None:
    module = Automatic()
    truth = accumulated(module, 0.1)
    fit(module, FFRCallback(**WEIGHTS), batch=2, accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert_same(module, truth)


def test_a_strategy_that_differentiates_by_itself_is_refused_before_training() -> None:
    class Engine(Precision):
        def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            raise AssertionError("training began")

    with pytest.raises(RuntimeError, match="Engine runs backward passes by itself"):
        fit(Automatic(), FFRCallback(**WEIGHTS), plugins=[Engine()])


def test_a_module_in_training_can_be_copied_and_its_copy_differentiated() -> None:
    copies: list[Automatic] = []

    class Copy(lightning.Callback):
        def on_before_zero_grad(self, trainer: Any, module: Any, optimizer: Any) -> None:
            copies.append(copy.deepcopy(module))

    module = Automatic()
    fit(module, FFRCallback(**WEIGHTS), Copy())
    twin = copies[0]
    twin.backward(twin.training_step(batches()[0], 0))
    assert twin.net.stem.weight.grad is not None
    pickled = Automatic(torch.sqrt)
    pickled.backward = copies[0].backward  # a bound method of a copy
    assert pickle.loads(pickle.dumps(pickled)).net is not None


def test_the_penalty_of_a_detached_call_is_left_out() -> None:
    """Targets that the network makes itself in train mode, with autograd."""

    class Targets(Automatic):
        def training_step(self, batch: Any, index: int) -> Tensor:
            target = self.net(batch[0].flip(0)).detach()
            return (self.net(batch[0]) - target).square().mean()

    module = Targets()
    twin = copy.deepcopy(module)
    optimizer = twin.configure_optimizers()
    for x, _ in batches():
        optimizer.zero_grad()
        answer, penalty = twin.net.run(x)
        ((answer - twin.net(x.flip(0)).detach()).square().mean() + penalty).backward()
        optimizer.step()
    fit(module, FFRCallback(**WEIGHTS))
    assert_same(module, twin)


def test_a_loss_that_depends_on_no_call_is_an_error() -> None:
    class Detached(Automatic):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(batch[0]).detach().mean() + self.net.stem.weight.sum()

    with pytest.raises(RuntimeError, match="depends on none of the recorded forward passes"):
        fit(Detached(), FFRCallback(**WEIGHTS))


def test_a_flow_given_as_a_regularizer_is_one() -> None:
    module = Automatic()
    twin = copy.deepcopy(module)
    fit(module, FFRCallback(**WEIGHTS))
    callback = FFRCallback(regularizers=lambda model: FeatureFlow(model, **WEIGHTS))
    fit(twin, callback)
    assert callback.flow is callback.regularizers[0]
    assert_same(module, twin)
