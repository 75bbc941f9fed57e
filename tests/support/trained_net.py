"""A small network, its data, and transformers' Trainer of it, for the tests of regularizers in training loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

X = torch.randn(16, 3, 6, 6, dtype=torch.float64)
Y = torch.arange(16) % 4


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


def hugging_face_trainer(model: nn.Module, make: Any, optimizer: Any, folder: Any, **options: Any) -> Any:
    """Batches of 8 in order, at a learning rate that stays."""
    transformers = pytest.importorskip("transformers")
    from ffr_ext.trainers import FFRTrainer

    examples = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    schedule = options.pop("ffr_schedule", None)
    settings = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True,
        max_grad_norm=0.0, disable_tqdm=True, logging_strategy="no", **options,
    )  # fmt: skip

    class InOrder(FFRTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(examples)

    trainer = InOrder(
        model=model, args=settings, train_dataset=examples, optimizers=(optimizer, None),
        ffr_regularizers=make, ffr_schedule=schedule,
    )  # fmt: skip
    trainer.create_scheduler = lambda *_, **__: torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, 1.0)
    return trainer
