"""FFRCallback in the steps that people write: GANs, closures, several backward passes and optimizers; each equals a plain
loop."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import outputs
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="needs ffr-ext[lightning]")

from lightning.pytorch.plugins.precision import Precision  # noqa: E402

from ffr_ext import FeatureFlow, ffr_loss  # noqa: E402
from ffr_ext.trainers import FFRCallback  # noqa: E402

WEIGHTS = {"gradient": 2.0, "curvature": 1.0}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::DeprecationWarning")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    def __init__(self, inputs: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(inputs, 6), nn.Linear(6, outputs)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The answer and the penalty, without any hook."""
        features = outputs(self.blocks, self.stem(x))
        return self.head(features[-1]), ffr_loss(features, backend="reference", **WEIGHTS)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, dtype=torch.float64, generator=generator), torch.arange(8) % 3


def batches(size: int = 4) -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return list(zip(x.split(size), y.split(size), strict=True))


def fit(module: Any, *callbacks: Any, batch: int = 4, ckpt_path: Any = None, **options: Any) -> Any:
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    trainer = lightning.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(module, DataLoader(TensorDataset(*data()), batch), ckpt_path=ckpt_path, weights_only=False)
    return trainer


def assert_same(actual: nn.Module, truth: nn.Module) -> None:
    for (name, a), b in zip(actual.named_parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# --- a GAN ----------------------------------------------------------------------------------------


class GAN(lightning.LightningModule):
    """`order`: how the two networks take their steps. `pen`: penalties added by hand, for a plain loop."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.g, self.d, self.order, self.automatic_optimization = Net(2, 4), Net(4, 1), order, False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.g, self.d)]

    def training_step(self, batch: Any, index: int) -> None:
        self.play(batch[0], *self.optimizers(), self.manual_backward, lambda net, x: (net(x), 0.0))

    def play(self, real: Tensor, opt_g: Any, opt_d: Any, backward: Any, call: Any) -> None:
        """One step; `call(net, x)` gives the answer and the penalty to be added by hand."""
        z = torch.ones(4, 2, dtype=torch.float64) * real[:, :2]
        shared, penalty_of_shared = call(self.g, z) if self.order.startswith("one fake") else (None, 0.0)

        def discriminator() -> None:
            opt_d.zero_grad()
            fake = self.g(z) if shared is None else shared
            if self.order != "one fake, differentiated twice":
                fake = fake.detach()
            (a, p), (b, q) = call(self.d, fake), call(self.d, real)
            loss = a.mean() - b.mean() + self.weigh("d", p + q)
            backward(loss, retain_graph=self.order == "one fake, differentiated twice")
            opt_d.step()

        def generator() -> None:
            opt_g.zero_grad()
            fake, penalty = call(self.g, z) if shared is None else (shared, penalty_of_shared)
            answer, p = call(self.d, fake)
            backward(-answer.mean() + self.weigh("g", penalty) + self.weigh("d", p))
            opt_g.step()

        if self.order == "generator first":
            generator()
            discriminator()
        else:
            discriminator()
            generator()

    penalised = ""

    def weigh(self, net: str, penalty: Any) -> Any:
        return penalty if net in self.penalised else 0.0

    def plainly(self, penalised: str) -> GAN:
        """A copy trained in a plain loop, with the penalties of these networks."""
        twin = copy.deepcopy(self)
        twin.penalised = penalised
        opt_g, opt_d = twin.configure_optimizers()
        for real, _ in batches():
            twin.play(real, opt_g, opt_d, lambda loss, **kwargs: loss.backward(**kwargs), lambda net, x: net.run(x))
        return twin


ORDERS = ["discriminator first", "generator first", "one fake", "one fake, differentiated twice"]


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


class WithLBFGS(lightning.LightningModule):
    def __init__(self, line_search: str | None, automatic: bool) -> None:
        super().__init__()
        self.net, self.line_search, self.automatic_optimization = Net(), line_search, automatic

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4, line_search_fn=self.line_search)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, index: int) -> Any:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)
        return None

    def plainly(self) -> WithLBFGS:
        twin = copy.deepcopy(self)
        optimizer = twin.configure_optimizers()
        for x, y in batches():

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                answer, penalty = twin.net.run(x)
                loss = nn.functional.cross_entropy(answer, y) + penalty
                loss.backward()
                return loss

            optimizer.step(closure)
        return twin


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
