"""Feature flow regularization in the Hugging Face Trainer: a small Vision Transformer with random weights
on digits.

pip install '.[hf,demo]'          # in a checkout
python examples/huggingface_vit.py --epochs 2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.data import load
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from ffr_ext.trainers import FFRTrainer


class Labelled(Dataset):
    """Images and labels under the names that ViT expects."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.x[index], "labels": self.y[index]}


def small_vit(classes: int) -> ViTForImageClassification:
    """Four layers of width 32 on 2x2 patches of 8x8 images."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}


def main(argv: list[str] | None = None) -> FFRTrainer:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--accumulate", type=int, default=1, help="micro-batches per optimiser step")
    arguments.add_argument("--out", type=Path, default=Path("runs/huggingface"))
    options = arguments.parse_args(argv)

    torch.manual_seed(0)
    images = load("digits")
    trainer = FFRTrainer(
        model=small_vit(images.classes),
        args=TrainingArguments(
            output_dir=str(options.out),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=64 // options.accumulate,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=2e-3,
            use_cpu=True,
            logging_steps=10,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Labelled(images.train_x, images.train_y),
        eval_dataset=Labelled(images.test_x, images.test_y),
        compute_metrics=accuracy,
        ffr_options={"gradient": 0.1, "curvature": 0.1},  # layers="auto": the four transformer layers
        ffr_schedule={"ramp": 20},
    )
    trainer.flow.describe({"pixel_values": images.test_x[:2]})
    trainer.train()
    print(trainer.evaluate())
    return trainer


if __name__ == "__main__":
    main()
