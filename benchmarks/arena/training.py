"""One run: a method, a strength, a seed. It may stop after any epoch, and goes on bit for bit."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.data import Images, batches, load
from examples.common.models import build
from ffr_ext.pruning import synthesize
from ffr_ext.schedules import WeightSchedule

from .ablation import ALL
from .methods import Method

GENERATIONS = (0.4, 0.6, 0.8)  # of the epochs: after these StressedNets draws who survives


@dataclass(frozen=True)
class Settings:
    """What a run is made of. Everything that another number follows from is here."""

    method: str
    strength: float
    seed: int
    data: str = "digits"
    data_dir: str = ""
    model: str = "resnet20"
    epochs: int = 120
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-3
    validation: float = 0.2  # share of the training images that no step sees
    finetune_epochs: int = 10
    train_images: int = 0  # 0: all

    @property
    def key(self) -> str:
        """The name of the run's folder."""
        return f"{self.data}-{self.model}-{self.epochs}/{self.method}-{self.strength:g}-seed{self.seed}"


@dataclass
class Split:
    """Images for training and for choosing; the test images are looked at once, at the end."""

    images: Images
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, settings: Settings) -> Split:
        images = load(settings.data, settings.data_dir or None)
        order = torch.randperm(len(images.train_x), generator=torch.Generator().manual_seed(0))
        if settings.train_images:
            order = order[: settings.train_images]
        held = int(len(order) * settings.validation)
        parts = [(images.train_x[i], images.train_y[i]) for i in (order[held:], order[:held])]
        return cls(images, parts[0], parts[1])


class Run:
    """Training with one method."""

    def __init__(self, settings: Settings, split: Split) -> None:
        self.settings, self.split = settings, split
        self.method: Method = ALL[settings.method]
        torch.manual_seed(settings.seed)
        self.model = build(settings.model, split.images.classes, split.images.channels)
        self.example = split.train[0][:2]
        decay = settings.weight_decay
        if self.method.weight_decay is not None:
            decay = self.method.weight_decay(settings.strength)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=decay,
            nesterov=True,
        )
        steps = -(-len(split.train[0]) // settings.batch_size) * settings.epochs
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, settings.lr, total_steps=steps)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.ramp = int(self.method.ramp * steps)
        self.finished = 0
        self.seconds = 0.0
        self.renew_regularizers()

    def renew_regularizers(self) -> None:
        """Those of the model as it is now."""
        self.regularizers = self.method.make(self.model, self.example, self.settings.strength)
        self.schedule = WeightSchedule(self.regularizers, ramp=self.ramp) if self.ramp else None

    def epoch(self) -> float:
        """Train for one epoch; the mean loss of the task."""
        begin = time.perf_counter()
        self.model.train()
        total = 0.0
        x_all, y_all = self.split.train
        for regularizer in self.regularizers:
            regularizer.attach()
        for x, y in batches(
            x_all, y_all, self.settings.batch_size, self.generator, self.split.images.augment
        ):
            total += step(self.model, self.optimizer, self.regularizers, x, y) * len(y)
            self.scheduler.step()
            if self.schedule is not None:
                self.schedule.step()
        for regularizer in self.regularizers:
            regularizer.detach()
        self.finished += 1
        self.seconds += time.perf_counter() - begin
        if self.method.synthesis and self.finished in [int(g * self.settings.epochs) for g in GENERATIONS]:
            self.synthesize()
        return total / len(x_all)

    def synthesize(self) -> None:
        """The next generation: channels are drawn by their strength, the optimizer goes on."""
        generator = torch.Generator().manual_seed(1000 * self.settings.seed + self.finished)
        made = synthesize(self.model, self.example, optimizer=self.optimizer, generator=generator)
        self.model = made.model
        self.renew_regularizers()

    def train(self, folder: Path, report: Any = lambda run, loss: None) -> None:
        """Up to the last epoch, leaving a checkpoint after each."""
        while self.finished < self.settings.epochs:
            report(self, self.epoch())
            self.save(folder)

    def save(self, folder: Path) -> None:
        """Write everything that the next epoch depends on. An interrupted save leaves the last one whole."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "finished": self.finished,
            "seconds": self.seconds,
            # The modules: generations have made them smaller than `build` makes them.
            "model": self.model,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if not callable(v)},
            "generator": self.generator.get_state(),
            "regularizers": [regularizer.state_dict() for regularizer in self.regularizers],
        }
        part = folder / "checkpoint.part"
        torch.save(state, part)
        part.replace(folder / "checkpoint.pt")

    def resume(self, folder: Path) -> bool:
        """Go on from a checkpoint in the folder, if there is one of these settings."""
        path = folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=False)  # our own file
        if state["settings"] != asdict(self.settings):
            raise ValueError(f"{path} was made with other settings: {json.dumps(state['settings'])}")
        # The optimizer's parameters are those of the module that is loaded, in the same order.
        self.model = state["model"]
        self.optimizer.param_groups[0]["params"] = list(self.model.parameters())
        self.optimizer.state.clear()
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.finished, self.seconds = state["finished"], state["seconds"]
        self.renew_regularizers()
        for regularizer, kept in zip(self.regularizers, state["regularizers"], strict=True):
            regularizer.load_state_dict(kept)
        if self.schedule is not None:
            self.schedule.set(self.scheduler.last_epoch)
        return True


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, regularizers: list[Any], x: Tensor, y: Tensor
) -> float:
    """One training step as `ffr_ext.regularizers.base` writes it out; the loss of the task."""
    optimizer.zero_grad(set_to_none=True)
    for regularizer in regularizers:
        regularizer.before_forward()
    task = F.cross_entropy(model(x), y)
    loss = task
    for regularizer in regularizers:
        if regularizer.joins_loss:
            loss = loss + regularizer.loss()
    loss.backward()
    for regularizer in regularizers:
        regularizer.after_backward()
        if not regularizer.joins_loss:
            regularizer.add_gradients_()
    optimizer.step()
    for regularizer in regularizers:
        regularizer.step()
    return float(task.detach())


@torch.no_grad()
def accuracy(model: nn.Module, images: tuple[Tensor, Tensor]) -> float:
    """Share of right answers, in eval mode."""
    model.eval()
    pairs = batches(*images, 500)
    return sum(float((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(images[0])
