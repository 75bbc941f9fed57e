"""Train a small image classifier with feature flow regularization, or another way to a smaller network.

    python examples/train.py                                # ResNet-20 on scikit-learn's digits, with FFR + scales
    python examples/train.py --method ffr                   # FFR alone
    python examples/train.py --method none                  # the same without
    python examples/train.py --method slimming --budget 0.5             # network slimming, to half of the FLOPs
    python examples/train.py --data cifar10 --data-dir ~/cifar-10-batches-py --model resnet56 --epochs 200

Writes history.csv (one row an epoch), terms.csv (length and curvature per term and epoch), filters.csv
(dead filters per layer at the end) and checkpoint.pt to the folder --out. `--resume` continues from the
checkpoint and gives bit for bit the numbers of an uninterrupted run.

With `--budget` the network is cut in `--rounds` rounds while it trains, each to the same share of what the last one
left, and trains on without the penalty after the last. What was cut is in plan-1.json, plan-2.json, ..., the weights of
the smaller network in compact.pt.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common.data import DATA, Images, batches, load
from common.filters import DEAD, convolutions, prune
from common.methods import FFR_WEIGHTS, METHODS, cut_epochs, make_regularizer, make_smaller
from common.models import MODELS, build, flow_layers
from torch import nn

from ffr_ext import CompactionPlan, FeatureFlow
from ffr_ext.backends import BACKENDS
from ffr_ext.options import NORMS
from ffr_ext.pruning.measure import count_flops


@dataclass
class Config:
    """One training run. The defaults are the recipe of the demo."""

    data: str = "digits"
    data_dir: str = ""
    model: str = "resnet20"
    epochs: int = 120
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-3
    method: str = "ffr+slimming"
    weight: float = 0.0  # of a penalty of weights; 0: what examples/common/methods.py says
    budget: float = 0.0  # share of the FLOPs to come down to; 0: the network is not cut
    rounds: int = 3
    ffr_gradient: float = -1.0  # below 0: what examples/common/methods.py says
    ffr_curvature: float = -1.0
    norm: str = "l1"
    backend: str = "auto"
    seed: int = 0
    threads: int = 0  # 0: what torch chooses

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        if not 0 <= self.budget < 1:
            raise ValueError(f"budget: expected a share of the FLOPs in 0 .. 1, got {self.budget:g}")
        if self.rounds < 1:
            raise ValueError(f"rounds: expected at least 1, got {self.rounds}")
        if self.ffr_gradient < 0:
            self.ffr_gradient = FFR_WEIGHTS.get(self.method, 0.0)
        if self.ffr_curvature < 0:
            self.ffr_curvature = FFR_WEIGHTS.get(self.method, 0.0)

    @property
    def with_ffr(self) -> bool:
        return self.method in FFR_WEIGHTS and (self.ffr_gradient != 0 or self.ffr_curvature != 0)


@dataclass
class Epoch:
    """What an epoch left behind: one row of history.csv."""

    epoch: int
    lr: float
    loss: float
    penalty: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    dead_filters: int
    filters: int
    flops: float  # share of those of the network as it was made
    seconds: float


class Run:
    """A training run that can be interrupted after any epoch."""

    def __init__(self, config: Config, images: Images | None = None) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.images = images or load(config.data, config.data_dir or None)
        torch.manual_seed(config.seed)
        self.model = build(config.model, self.images.classes, self.images.channels)
        self.layers = flow_layers(self.model)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        steps = -(-len(self.images.train_x) // config.batch_size)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.lr, total_steps=steps * config.epochs
        )
        self.generator = torch.Generator().manual_seed(config.seed)
        self.survivors = torch.Generator().manual_seed(config.seed)  # draws generations
        self.plans: list[CompactionPlan] = []
        self.cuts = 0
        self.whole = self.flops()
        self.history: list[Epoch] = []
        self.terms: list[dict[str, Any]] = []
        self.regularize()

    @property
    def example(self) -> torch.Tensor:
        return self.images.test_x[:2]

    def flops(self) -> int:
        return count_flops(self.model, (self.example,), {})

    def regularize(self) -> None:
        """The penalty of the network as it is now; none once the last cut is made."""
        config = self.config
        self.flow = FeatureFlow(
            self.model,
            self.layers,
            gradient=config.ffr_gradient,
            curvature=config.ffr_curvature,
            norm=config.norm,
            backend=config.backend,
        )
        self.done = bool(config.budget) and self.cuts >= config.rounds
        method = "none" if self.done else config.method
        self.regularizer = make_regularizer(method, self.model, self.example, config.weight)

    @property
    def with_ffr(self) -> bool:
        return self.config.with_ffr and not self.done

    def cut(self) -> None:
        """One round: down to the next share of the FLOPs, with the same optimizer."""
        config = self.config
        self.cuts += 1
        share = config.budget ** (self.cuts / config.rounds) * self.whole / self.flops()
        cuts = make_smaller(
            config.method, self.model, self.example, min(share, 1.0), self.optimizer, self.survivors
        )
        self.plans += [cut.plan for cut in cuts]
        self.model = cuts[-1].model
        self.regularize()

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step; the logits, the loss and the penalty of features."""
        regularizer = self.regularizer
        if regularizer is not None:
            regularizer.before_forward()
        logits = self.model(x)
        task = F.cross_entropy(logits, y)
        penalty = self.flow.loss() if self.with_ffr else task.new_zeros(())
        self.optimizer.zero_grad(set_to_none=True)
        (task + penalty).backward()
        if regularizer is not None:
            regularizer.after_backward()
            regularizer.add_gradients_()
        self.optimizer.step()
        if regularizer is not None:
            regularizer.step()
        self.scheduler.step()
        return logits.detach(), task.detach(), penalty.detach()

    def epoch(self) -> Epoch:
        """Train for one epoch, then measure on the test images."""
        start = time.perf_counter()
        sums = torch.zeros(3)  # loss, penalty, correct answers; added up on the device, read once
        self.model.train()
        images = self.images
        with self.flow if self.with_ffr else nullcontext():
            for x, y in batches(
                images.train_x, images.train_y, self.config.batch_size, self.generator, images.augment
            ):
                logits, task, penalty = self.step(x, y)
                correct = (logits.argmax(1) == y).sum()
                sums += torch.stack([task * len(y), penalty * len(y), correct])
        loss, penalty_mean, accuracy = (sums / len(images.train_x)).tolist()
        if self.regularizer is not None:
            penalty_mean += float(sum(self.regularizer.terms().values()))
        number = len(self.history) + 1
        for epoch in cut_epochs(self.config.epochs, self.config.rounds) if self.config.budget else []:
            if epoch == number:
                self.cut()
        test_loss, test_accuracy, terms = self.test()
        filters = convolutions(self.model)
        self.terms += [{"epoch": number, **row} for row in terms]
        self.history.append(
            Epoch(
                epoch=number,
                lr=self.scheduler.get_last_lr()[0],
                loss=loss,
                penalty=penalty_mean,
                train_accuracy=accuracy,
                test_loss=test_loss,
                test_accuracy=test_accuracy,
                dead_filters=sum(layer.zero_filters for layer in filters),
                filters=sum(layer.filters for layer in filters),
                flops=self.flops() / self.whole,
                seconds=time.perf_counter() - start,
            )
        )
        return self.history[-1]

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Test accuracy of another network on the same images."""
        model.eval()
        pairs = batches(self.images.test_x, self.images.test_y, 500)
        return sum(float((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(self.images.test_x)

    @torch.no_grad()
    def test(self) -> tuple[float, float, list[dict[str, Any]]]:
        """Loss and accuracy on the test images, and the mean length and curvature of their flow, term by
        term."""
        self.model.eval()
        loss = correct = 0.0
        gradient, curvature = torch.zeros(()), torch.zeros(())
        options = {"norm": self.config.norm, "backend": self.config.backend}
        measure = FeatureFlow(self.model, self.layers, capture_eval=True, **options)
        count = len(self.images.test_x)
        with measure:
            for x, y in batches(self.images.test_x, self.images.test_y, 500):
                logits = self.model(x)
                terms = measure.terms()
                gradient = gradient + terms.gradient * len(y)
                curvature = curvature + terms.curvature * len(y)
                loss += float(F.cross_entropy(logits, y, reduction="sum"))
                correct += float((logits.argmax(1) == y).sum())
        rows = [
            {"kind": kind, "term": index, "value": value / count}
            for kind, values in (("length", gradient), ("curvature", curvature))
            for index, value in enumerate(values.tolist())
        ]
        return loss / count, correct / count, rows

    def train(
        self, after_epoch: Callable[[Epoch], None] = lambda epoch: None, until: int | None = None
    ) -> None:
        """Train up to the configured number of epochs, or only to ``until``."""
        while len(self.history) < min(until or self.config.epochs, self.config.epochs):
            after_epoch(self.epoch())

    def save(self, path: Path) -> None:
        """Write everything that the next epoch depends on."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if not callable(v)},
            "generator": self.generator.get_state(),
            "survivors": self.survivors.get_state(),
            "regularizer": None if self.regularizer is None else self.regularizer.state_dict(),
            "plans": [plan_text(plan, path) for plan in self.plans],
            "cuts": self.cuts,
            "history": [asdict(epoch) for epoch in self.history],
            "terms": self.terms,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)  # an interrupted save leaves the last checkpoint whole

    @classmethod
    def resume(cls, path: Path, images: Images | None = None) -> Run:
        """Continue a run; ValueError if the file is no checkpoint of this script."""
        if not path.is_file():
            raise FileNotFoundError(
                f"resume: {path} is not there; expected a checkpoint.pt written by this script"
            )
        try:
            state = torch.load(path, weights_only=True)
            run = cls(Config(**state["config"]), images)
        except (KeyError, TypeError, RuntimeError, OSError) as error:
            raise ValueError(
                f"resume: {path} is not a checkpoint written by this script: {error!r}"
            ) from error
        run.restore_cuts(state["plans"], state["cuts"], path)
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        run.generator.set_state(state["generator"])
        run.survivors.set_state(state["survivors"])
        if run.regularizer is not None:
            run.regularizer.load_state_dict(state["regularizer"])
        run.history = [Epoch(**row) for row in state["history"]]
        run.terms = state["terms"]
        return run

    def restore_cuts(self, plans: list[str], cuts: int, path: Path) -> None:
        """The fresh network and its optimizer, cut as those of the checkpoint."""
        self.plans = [plan_of(text, path) for text in plans]
        self.cuts = cuts
        for plan in self.plans:
            plan.apply(self.model, self.optimizer)
        if cuts:
            self.regularize()

    def write_logs(self, folder: Path) -> None:
        """history.csv, terms.csv and filters.csv."""
        write_csv(folder / "history.csv", [asdict(epoch) for epoch in self.history])
        write_csv(folder / "terms.csv", self.terms)
        write_csv(folder / "filters.csv", [asdict(layer) for layer in convolutions(self.model)])


def plan_text(plan: CompactionPlan, near: Path) -> str:
    part = near.with_suffix(".plan")
    plan.save(part)
    text = part.read_text()
    part.unlink()
    return text


def plan_of(text: str, near: Path) -> CompactionPlan:
    part = near.with_suffix(".plan")
    part.write_text(text)
    plan = CompactionPlan.load(part)
    part.unlink()
    return plan


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parser() -> argparse.ArgumentParser:
    """Command line: one option for each field of Config."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = {
        "data": list(DATA),
        "method": list(METHODS),
        "model": list(MODELS),
        "norm": list(NORMS),
        "backend": ["auto", *BACKENDS],
    }
    own = "the method's own, see examples/common/methods.py"
    notes = {
        "weight": f"of a penalty of weights; 0: {own}; ",
        "ffr_gradient": f"below 0: {own}; ",
        "ffr_curvature": f"below 0: {own}; ",
        "budget": "share of the FLOPs to come down to; 0: the network is not cut; ",
        "rounds": "of cuts to the budget; ",
        "threads": "0: what torch chooses; ",
    }
    for field in fields(Config):
        arguments.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            choices=choices.get(field.name),
            help=f"{notes.get(field.name, '')}default {field.default!r}",
        )
    arguments.add_argument(
        "--out", type=Path, default=Path("runs/train"), help="folder of the logs and the checkpoint"
    )
    arguments.add_argument("--checkpoint-every", type=int, default=10, metavar="EPOCHS")
    arguments.add_argument(
        "--compact",
        action="store_true",
        help="cut the dead filters out at the end; writes compact.pt and plan.json",
    )
    arguments.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    return arguments


def main(argv: list[str] | None = None) -> Run:
    arguments = parser().parse_args(argv)
    checkpoint = arguments.out / "checkpoint.pt"
    try:
        config = Config(**{field.name: getattr(arguments, field.name) for field in fields(Config)})
        run = Run.resume(checkpoint) if arguments.resume else Run(config)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(f"train.py: {error}") from error
    arguments.out.mkdir(parents=True, exist_ok=True)

    def after_epoch(epoch: Epoch) -> None:
        print(
            f"epoch {epoch.epoch:3d}/{run.config.epochs}  loss {epoch.loss:.4f}  penalty "
            f"{epoch.penalty:.4f}  "
            f"test accuracy {epoch.test_accuracy:.2%}  dead filters {epoch.dead_filters}/{epoch.filters}  "
            f"{epoch.seconds:.1f} s",
            flush=True,
        )
        if epoch.epoch % arguments.checkpoint_every == 0 or epoch.epoch == run.config.epochs:
            run.save(checkpoint)

    run.train(after_epoch)
    run.write_logs(arguments.out)
    dead = run.history[-1].dead_filters
    print(
        f"{dead} of {run.history[-1].filters} filters have an effective scale under {DEAD}; logs in "
        f"{arguments.out}"
    )
    if arguments.compact or run.plans:
        write_compacted(run, arguments.out, arguments.compact)
    return run


def write_compacted(run: Run, folder: Path, compact: bool) -> None:
    """The smaller network: its weights in compact.pt, and in plan.json (plan-1.json, ... one after another, if it was
    cut while it trained) what to cut from a fresh network to load them."""
    plans, smaller = list(run.plans), run.model
    if compact:
        pruned = prune(run.model, run.images.test_x[:8])
        smaller = pruned.compaction.model
        plans.append(pruned.compaction.plan)
        print(pruned.compaction.report)
    for number, plan in enumerate(plans, start=1):
        plan.save(folder / (f"plan-{number}.json" if run.plans else "plan.json"))
    torch.save(smaller.state_dict(), folder / "compact.pt")
    left = count_flops(smaller, (run.example,), {}) / run.whole
    print(f"{left:.1%} of the FLOPs are left")
    print(f"test accuracy {run.accuracy(run.model):.2%}, of the smaller network {run.accuracy(smaller):.2%}")


if __name__ == "__main__":
    main()
