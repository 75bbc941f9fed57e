"""Under a GradScaler the first steps are often left out: in every loop proximal maps follow the real ones alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trained_net import Net, X, Y, hugging_face_trainer

from ffr_ext.regularizers import SparseGroupLasso


def make(model: nn.Module) -> SparseGroupLasso:
    """Single weights by gradient, groups by proximal map."""
    return SparseGroupLasso(model, weight=1e-2, groups="coupled", example_inputs=X, form="prox")


class Overflows(Net):
    """Its loss overflows at the first batch, so that a scaler leaves the first step out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(x)
        if labels is None:
            return logits
        self.calls += 1
        return {"loss": F.cross_entropy(logits, labels) * (float("inf") if self.calls == 1 else 1.0)}


def in_a_plain_loop(model: nn.Module, optimizer: Any, tmp_path: Any) -> None:
    regularizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in zip(X.split(8), Y.split(8), strict=True):
        optimizer.zero_grad()
        scaler.scale(model(x, y)["loss"]).backward()
        scaler.unscale_(optimizer)
        regularizer.add_gradients_()
        scaler.step(optimizer)
        scaler.update()
        regularizer.step()


def in_lightning(model: nn.Module, optimizer: Any, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins.precision import MixedPrecision

    from ffr_ext.trainers import FFRCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            return self.net(*batch)["loss"]

        def configure_optimizers(self) -> Any:
            return optimizer

    class ScalesOnly(MixedPrecision):
        def forward_context(self) -> Any:
            return nullcontext()

    precision = ScalesOnly("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    lightning.Trainer(
        callbacks=[FFRCallback(regularizers=lambda m: make(m.net))], max_epochs=1, accelerator="cpu",
        plugins=[precision], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), DataLoader(TensorDataset(X, Y), 8))  # fmt: skip


def in_hugging_face(model: nn.Module, optimizer: Any, tmp_path: Any) -> None:
    trainer = hugging_face_trainer(model, make, optimizer, tmp_path, num_train_epochs=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train()


def in_accelerate(model: nn.Module, optimizer: Any, tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    regularizer = make(model)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(X, Y), 8))
    for x, y in loader:
        accelerator.backward(prepared(x, y)["loss"])
        accelerator.scaler.unscale_(optimizer.optimizer)  # unscale_gradients does it under fp16 alone
        regularizer.add_gradients_()
        optimizer.step()
        regularizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("loop", [in_a_plain_loop, in_lightning, in_hugging_face, in_accelerate])
def test_a_proximal_map_follows_every_step_but_those_a_scaler_leaves_out(
    loop: Any, fused: bool, tmp_path: Any
) -> None:
    """The first batch overflows, and the second trains as if it were the first: the map acts at once, and once. Without
    momentum, whose buffer a fused step that is left out does not fill."""
    model, alone = Overflows(), Net()
    loop(model, torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), tmp_path)
    regularizer, optimizer = make(alone), torch.optim.SGD(alone.parameters(), lr=0.1)
    F.cross_entropy(alone(X[8:]), Y[8:]).backward()
    regularizer.add_gradients_()
    optimizer.step()
    unshrunk = alone.conv2.weight.detach().clone()
    regularizer.step()
    assert not torch.equal(alone.conv2.weight, unshrunk)
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
