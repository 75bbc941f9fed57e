"""Regularizers of weights in the loops that people have: every trainer does what a plain loop does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ffr_ext.regularizers import OutInChannelLasso, ScaleLasso, SparseGroupLasso, Stress
from ffr_ext.schedules import WeightSchedule

X = torch.randn(16, 3, 6, 6, dtype=torch.float64)
Y = torch.arange(16) % 4
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


class Net(nn.Module):
    """Called with images alone it gives logits, with labels too what transformers' Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3), nn.GroupNorm(8, 8), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(24, 4)
        self.double()
        with torch.no_grad():
            self.norm.weight.uniform_(0.1, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))).flatten(1))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


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
        assert not torch.equal(b, c)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "stress"])
def test_a_loss_with_the_penalty_in_it_trains_like_gradients_in_place(kind: str) -> None:
    model = Net()
    regularizer = KINDS[kind](model)
    schedule = WeightSchedule(regularizer, **SCHEDULE)
    optimizer = optimizer_of(model)
    for _ in range(2):
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + regularizer.loss()).backward()
            optimizer.step()
            regularizer.step()
            schedule.step()
    assert_same(model, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_scaler_changes_nothing(kind: str) -> None:
    """Gradients are added after `unscale_`; in the loss they are scaled with it."""
    model = Net()
    regularizer = KINDS[kind](model)
    schedule = WeightSchedule(regularizer, **SCHEDULE)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            optimizer.zero_grad()
            regularizer.before_forward()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            regularizer.after_backward()
            scaler.unscale_(optimizer)
            regularizer.add_gradients_()
            scaler.step(optimizer)
            scaler.update()
            regularizer.step()
            schedule.step()
    assert_same(model, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_is_untouched(kind: str) -> None:
    model = Net()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    regularizer = KINDS[kind](model)
    schedule = WeightSchedule(regularizer, **SCHEDULE)
    optimizer = optimizer_of(model)
    for _ in range(2):
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            optimizer.zero_grad()
            regularizer.before_forward()
            F.cross_entropy(compiled(x), y).backward()
            regularizer.after_backward()
            regularizer.add_gradients_()
            optimizer.step()
            regularizer.step()
            schedule.step()
    assert_same(model, kind)
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_resumed(kind: str) -> None:
    def steps(model: nn.Module, regularizer: Any, schedule: Any, optimizer: Any, which: range) -> None:
        for step in which:
            x, y = X.split(8)[step % 2], Y.split(8)[step % 2]
            optimizer.zero_grad()
            regularizer.before_forward()
            F.cross_entropy(model(x), y).backward()
            regularizer.after_backward()
            regularizer.add_gradients_()
            optimizer.step()
            regularizer.step()
            schedule.step()

    def start() -> tuple[nn.Module, Any, Any, Any]:
        model = Net()
        regularizer = KINDS[kind](model)
        return model, regularizer, WeightSchedule(regularizer, **SCHEDULE), optimizer_of(model)

    run = start()
    steps(*run, range(2))
    states = copy.deepcopy([part.state_dict() for part in run])
    again = start()
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    steps(*again, range(2, 4))
    assert_same(again[0], kind)


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
    transformers = pytest.importorskip("transformers")
    from ffr_ext.trainers import FFRTrainer

    model = Net()
    examples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, num_train_epochs=2, report_to=[], save_strategy="no",
        use_cpu=True, max_grad_norm=0.0, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip

    class InOrder(FFRTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

    trainer = InOrder(
        model=model, args=settings, train_dataset=examples, optimizers=(optimizer_of(model), None),
        ffr_regularizers=KINDS[kind], ffr_schedule=SCHEDULE,
    )  # fmt: skip
    trainer.create_scheduler = lambda *_, **__: torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)
    trainer.train()
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
