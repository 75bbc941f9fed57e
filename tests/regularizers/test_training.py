"""Regularizers of weights in the loops that people have: every trainer does what a plain loop does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flow_models import ResidualNet, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trained_net import Net, X, Y, hugging_face_trainer

from ffr_ext import FeatureFlow
from ffr_ext.regularizers import OutInChannelLasso, ScaleLasso, SparseGroupLasso, Stress
from ffr_ext.schedules import WeightSchedule

SCHEDULE: dict[str, Any] = {"wait": 1, "ramp": 2}

KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "slimming": lambda m: ScaleLasso(m, weight=0.1),
    "slimming, prox": lambda m: ScaleLasso(m, weight=0.1, form="prox"),
    "sparse groups": lambda m: SparseGroupLasso(
        m, weight=1e-2, groups="coupled", example_inputs=X, form="prox"
    ),
    "out-in": lambda m: OutInChannelLasso(m, X, weight=0.05),
    "stress": lambda m: Stress(m, X, attenuation=0.5),
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def plain(kind: str, micro: int = 1) -> nn.Module:
    """The loop of `ffr_ext.regularizers.base`, with a schedule; two batches of 8 an epoch, two epochs."""
    model = Net()
    regularizer = KINDS[kind](model)
    schedule = WeightSchedule(regularizer, **SCHEDULE)
    optimizer = optimizer_of(model)
    for _ in range(2):
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            optimizer.zero_grad()
            for a, b in zip(x.chunk(micro), y.chunk(micro), strict=True):
                regularizer.before_forward()
                (F.cross_entropy(model(a), b) / micro).backward()
                regularizer.after_backward()
            regularizer.add_gradients_()
            optimizer.step()
            regularizer.step()
            schedule.step()
    return model


def assert_same(model: nn.Module, kind: str, micro: int = 1, tolerance: float = 1e-12) -> None:
    truth = plain(kind, micro)
    untrained = Net()
    for (name, a), b, c in zip(
        model.named_parameters(), truth.parameters(), untrained.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        assert name == "conv1.bias" or not torch.equal(b, c)  # the norm takes that one out again


class Loop:
    """A plain loop in parts that the tests exchange."""

    def __init__(self, kind: str) -> None:
        self.model = Net()
        self.called: Any = self.model
        self.regularizer = KINDS[kind](self.model)
        self.schedule = WeightSchedule(self.regularizer, **SCHEDULE)
        self.optimizer = optimizer_of(self.model)

    @property
    def parts(self) -> list[Any]:
        return [self.model, self.regularizer, self.schedule, self.optimizer]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def add_gradients(self) -> None:
        self.regularizer.add_gradients_()

    def step(self) -> None:
        self.optimizer.step()

    def run(self, which: range = range(4)) -> nn.Module:
        for step in which:
            self.optimizer.zero_grad()
            self.regularizer.before_forward()
            self.backward(F.cross_entropy(self.called(X.split(8)[step % 2]), Y.split(8)[step % 2]))
            self.regularizer.after_backward()
            self.add_gradients()
            self.step()
            self.regularizer.step()
            self.schedule.step()
        return self.model


class InTheLoss(Loop):
    def backward(self, loss: Tensor) -> None:
        (loss + self.regularizer.loss()).backward()

    def add_gradients(self) -> None:
        pass


class Scaled(Loop):
    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def add_gradients(self) -> None:
        self.scaler.unscale_(self.optimizer)
        super().add_gradients()

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_with_the_penalty_in_it_trains_like_gradients_in_place(kind: str) -> None:
    assert_same(InTheLoss(kind).run(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_scaler_changes_nothing(kind: str) -> None:
    """Gradients are added after `unscale_`."""
    assert_same(Scaled(kind).run(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_untouched(kind: str) -> None:
    loop = Loop(kind)
    loop.called = torch.compile(loop.model, backend="aot_eager", fullgraph=True)
    assert_same(loop.run(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed(kind: str) -> None:
    first, second = Loop(kind), Loop(kind)
    first.run(range(2))
    for part, other in zip(second.parts, first.parts, strict=True):
        part.load_state_dict(copy.deepcopy(other.state_dict()))
    assert_same(second.run(range(2, 4)), kind)


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_lightning(kind: str, micro: int) -> None:
    lightning = pytest.importorskip("lightning")
    from ffr_ext.trainers import FFRCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return optimizer_of(self)

    module = Module()
    callback = FFRCallback(regularizers=lambda m: KINDS[kind](m.net), schedule=SCHEDULE)
    lightning.Trainer(
        callbacks=[callback], max_epochs=2, accumulate_grad_batches=micro, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(TensorDataset(X, Y), 8 // micro))  # fmt: skip
    assert_same(module.net, kind, micro)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face(kind: str, tmp_path: Any) -> None:
    model = Net()
    hugging_face_trainer(
        model, KINDS[kind], optimizer_of(model), tmp_path, num_train_epochs=2, ffr_schedule=SCHEDULE
    ).train()
    assert_same(model, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate(kind: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net()
    regularizer = KINDS[kind](model)
    schedule = WeightSchedule(regularizer, **SCHEDULE)
    prepared, optimizer, loader = accelerator.prepare(
        model, optimizer_of(model), DataLoader(TensorDataset(X, Y), 4)
    )
    for _ in range(2):
        for x, y in loader:
            with accelerator.accumulate(prepared):
                regularizer.before_forward()
                accelerator.backward(F.cross_entropy(prepared(x), y))
                regularizer.after_backward()
                if accelerator.sync_gradients:
                    regularizer.add_gradients_()
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    regularizer.step()
                    schedule.step()
    assert_same(model, kind, micro=2)


def test_the_step_that_the_protocol_writes_out_holds_for_penalties_of_features_and_of_weights() -> None:
    """`ffr_ext.regularizers.base`, word for word; a step without a loss of the flow leaves nothing behind."""
    x = images()
    y = torch.arange(len(x)) % 10
    by_protocol, by_hand = ResidualNet(), ResidualNet()
    by_hand.load_state_dict(by_protocol.state_dict())
    regularizers = [
        FeatureFlow(by_protocol, norm="l2_squared").attach(),
        ScaleLasso(by_protocol, weight=0.01),
    ]
    optimizer = torch.optim.SGD(by_protocol.parameters(), lr=0.1)
    for use_penalty in (True, False, True):
        optimizer.zero_grad()
        for reg in regularizers:
            reg.before_forward()
        loss = F.cross_entropy(by_protocol(x), y)
        for reg in regularizers:
            if reg.joins_loss and use_penalty:
                loss = loss + reg.loss()
        loss.backward()
        for reg in regularizers:
            reg.after_backward()
            if not reg.joins_loss:
                reg.add_gradients_()
        optimizer.step()
        for reg in regularizers:
            reg.step()
    plain = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    lasso = ScaleLasso(by_hand, weight=0.01)
    with FeatureFlow(by_hand, norm="l2_squared") as flow:
        for use_penalty in (True, False, True):
            plain.zero_grad()
            loss = F.cross_entropy(by_hand(x), y)
            (loss + flow.loss() if use_penalty else loss).backward()
            lasso.add_gradients_()
            plain.step()
    for a, b in zip(by_protocol.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)
