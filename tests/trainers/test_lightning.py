"""FFRCallback: the Lightning trainer takes the steps of a plain loop with FeatureFlow."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flow_models import Tower, outputs, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="needs ffr-ext[lightning]")

from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from ffr_ext import ffr_loss  # noqa: E402
from ffr_ext.trainers import FFRCallback  # noqa: E402

OPTIONS: dict[str, Any] = {"gradient": 2.0, "curvature": 1.0, "backend": "reference"}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Module(lightning.LightningModule):
    """Calls its network in one of the ways people do."""

    def __init__(self, call: str = "self.net(x)") -> None:
        super().__init__()
        self.net = Tower()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Any:
        x, y = batch
        if self.call == "self(x)":
            logits = self(x)
        elif self.call == "submodules":
            logits = self.net.head(self.net.layers(x))
        else:
            logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        return {"loss": loss} if self.call == "dict" else loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batch: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*Tower.data()), batch)


def make_trainer(callback: FFRCallback | None, folder: Path, **options: Any) -> Any:
    settings = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **options,
    }
    return lightning.Trainer(callbacks=[callback] if callback else [], **settings)


def assert_same_weights(module: Module, truth: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name, value in module.net.state_dict().items():
        torch.testing.assert_close(value, truth[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("call", ["self.net(x)", "self(x)", "submodules", "dict"])
def test_steps_are_those_of_a_plain_loop_however_the_network_is_called(tmp_path: Path, call: str) -> None:
    module = Module(call)
    truth = trained(copy.deepcopy(module.net), 3, **OPTIONS)
    without = trained(copy.deepcopy(module.net), 3, gradient=0.0, curvature=0.0, backend="reference")
    assert not torch.allclose(truth["layers.0.linear.weight"], without["layers.0.linear.weight"])
    make_trainer(FFRCallback(**OPTIONS), tmp_path).fit(module, loader(), loader())
    assert_same_weights(module, truth)


@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path, micro_batches: int) -> None:
    module = Module()
    truth = trained(copy.deepcopy(module.net), 3, **OPTIONS)
    trainer = make_trainer(FFRCallback(**OPTIONS), tmp_path, accumulate_grad_batches=micro_batches)
    trainer.fit(module, loader(16 // micro_batches))
    assert_same_weights(module, truth)


def test_a_gradient_scaler_scales_the_penalty_like_the_loss(tmp_path: Path) -> None:
    module = Module()
    truth = trained(copy.deepcopy(module.net), 3, **OPTIONS)
    # bfloat16 autocast with a scaler: on a CPU the scaler is what matters here.
    precision = MixedPrecision("bf16-mixed", "cpu")
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer = make_trainer(FFRCallback(**OPTIONS), tmp_path, plugins=[precision])
    trainer.fit(module, loader())
    assert_same_weights(module, truth, tolerance=2e-2)  # bfloat16; a wrong scale would be off by 1024


def test_nothing_is_left_on_the_module(tmp_path: Path) -> None:
    module = Module()
    keys = list(module.state_dict())
    make_trainer(FFRCallback(**OPTIONS), tmp_path).fit(module, loader())
    assert list(module.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_layers_and_terms_are_logged(tmp_path: Path) -> None:
    callback = FFRCallback(["layers.0", "layers.1", "layers.2"], module="net", **OPTIONS)
    trainer = make_trainer(callback, tmp_path, log_every_n_steps=1)
    trainer.fit(Module(), loader())
    assert callback.flow is not None
    assert callback.flow.layers == ["layers.0", "layers.1", "layers.2"]
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert set(logged) == {
        "ffr/penalty",
        "ffr/factor",
        "ffr/length/0",
        "ffr/length/1",
        "ffr/curvature/0",
    }
    terms = 2 * (logged["ffr/length/0"] + logged["ffr/length/1"]) + logged["ffr/curvature/0"]
    assert logged["ffr/penalty"] == pytest.approx(terms, rel=1e-5)


def test_a_schedule_counts_optimiser_steps_and_survives_a_checkpoint(tmp_path: Path) -> None:
    schedule = {"wait": 1, "ramp": 4}
    first = FFRCallback(schedule=schedule, **OPTIONS)
    trainer = make_trainer(first, tmp_path, max_epochs=2, accumulate_grad_batches=2)
    module = Module()
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    factors = []

    class Watch(lightning.Callback):
        def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
            factors.append(second.schedule.factor)

    second = FFRCallback(schedule=schedule, **OPTIONS)
    resumed = make_trainer(second, tmp_path, max_epochs=5, accumulate_grad_batches=2)
    resumed.callbacks.append(Watch())
    resumed.fit(Module(), loader(8), ckpt_path=tmp_path / "run.ckpt", weights_only=False)
    # Two optimiser steps are behind: wait, 0.25. Each step has two micro-batches.
    assert factors == [0.5, 0.5, 0.75, 0.75, 1.0, 1.0]


def test_a_weight_of_zero_leaves_the_loss_alone(tmp_path: Path) -> None:
    module = Module()
    truth = trained(copy.deepcopy(module.net), 3, gradient=0.0, curvature=0.0, backend="reference")
    make_trainer(FFRCallback(schedule={"wait": 10}, **OPTIONS), tmp_path).fit(module, loader())
    assert_same_weights(module, truth)


class TwoViews(Module):
    """Compares two views and a teacher's answer, and looks at an evaluation on the way."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        first, second = TwoViews.views(batch[0])
        with torch.no_grad():
            teacher = self.net(first)
        self.eval()
        self(second)
        self.train()
        call = self if self.call == "self(x)" else self.net
        return TwoViews.task(call(first), call(second), teacher)

    @staticmethod
    def views(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.flip(1)

    @staticmethod
    def task(first: Tensor, second: Tensor, teacher: Tensor) -> Tensor:
        return (first - second).square().mean() + (first - teacher).square().mean()

    @staticmethod
    def trained(net: Tower, steps: int) -> dict[str, Tensor]:
        """What plain steps with ffr_loss make of the network."""
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            penalties, answers = [], []
            for x in TwoViews.views(Tower.data()[0]):
                features = outputs(net.layers, x)
                answers.append(net.head(features[-1]))
                penalties.append(ffr_loss(features, **OPTIONS))
            (TwoViews.task(*answers, answers[0].detach()) + sum(penalties)).backward()
            optimizer.step()
        return dict(net.state_dict())


@pytest.fixture
def _one_process() -> Iterator[None]:
    """Lightning leaves its process group and the variables that describe it behind."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("strategy", ["auto", "ddp"])  # under ddp the step runs inside a call of the module
@pytest.mark.parametrize("call", ["self.net(x)", "self(x)"])
def test_each_call_of_the_network_in_a_step_is_a_path(tmp_path: Path, call: str, strategy: str) -> None:
    module = TwoViews(call)
    truth = TwoViews.trained(copy.deepcopy(module.net), 3)
    callback = FFRCallback(**OPTIONS)
    make_trainer(callback, tmp_path, strategy=strategy, log_every_n_steps=1).fit(module, loader())
    assert_same_weights(module, truth)


class TwoBackwards(Module):
    """Manual optimisation with two backward passes a batch, as a GAN has."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Parameter(torch.zeros(3))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]) * 1.0)
        self.manual_backward(self.other.sum())
        optimizer.step()


def test_under_manual_optimisation_the_first_backward_of_a_batch_gets_the_penalty(tmp_path: Path) -> None:
    module = TwoBackwards()
    truth = trained(copy.deepcopy(module.net), 3, **OPTIONS)
    make_trainer(FFRCallback(**OPTIONS), tmp_path).fit(module, loader())
    assert_same_weights(module, truth)


class LateModule(Module):
    """Makes its layers in configure_model, as sharded strategies want it."""

    def configure_model(self) -> None:
        torch.manual_seed(3)
        self.net = Tower()


def test_layers_made_by_configure_model_are_found(tmp_path: Path) -> None:
    torch.manual_seed(3)
    truth = trained(Tower(), 3, **OPTIONS)
    module = LateModule()
    make_trainer(FFRCallback(**OPTIONS), tmp_path).fit(module, loader())
    assert_same_weights(module, truth)


def test_a_missing_layer_is_named_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no module named 'layers\.9'"):
        make_trainer(FFRCallback(["layers.9"], module="net"), tmp_path).fit(Module(), loader())
