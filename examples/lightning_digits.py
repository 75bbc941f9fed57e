"""Feature flow regularization in PyTorch Lightning: one callback, and the LightningModule knows nothing of
it.

pip install '.[lightning,demo]'          # in a checkout
python examples/lightning_digits.py --epochs 3
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from common.data import load
from common.models import build, flow_layers
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ffr_ext.trainers import FFRCallback


class Digits(lightning.LightningModule):
    """An ordinary classifier."""

    def __init__(self, model: str, classes: int, channels: int) -> None:
        super().__init__()
        self.net = build(model, classes, channels)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)


def main(argv: list[str] | None = None) -> lightning.Trainer:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--epochs", type=int, default=3)
    arguments.add_argument("--model", default="resnet20")
    arguments.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimiser step")
    arguments.add_argument("--out", type=Path, default=Path("runs/lightning"))
    options = arguments.parse_args(argv)

    lightning.seed_everything(0)
    images = load("digits")
    module = Digits(options.model, images.classes, images.channels)
    callback = FFRCallback(
        flow_layers(module.net), module="net", gradient=3.0, curvature=3.0, schedule={"wait": 5, "ramp": 10}
    )
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=options.accumulate,
        callbacks=[callback],
        logger=CSVLogger(options.out, name="", version=""),
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch_size = 128 // options.accumulate
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(
        TensorDataset(images.train_x, images.train_y),
        batch_size,
        shuffle=True,
        drop_last=True,
        generator=generator,
    )
    trainer.fit(module, train, DataLoader(TensorDataset(images.test_x, images.test_y), 360))
    print(
        {name: round(float(value), 4) for name, value in trainer.callback_metrics.items() if "/" not in name}
    )
    return trainer


if __name__ == "__main__":
    main()
