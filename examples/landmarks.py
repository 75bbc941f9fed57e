"""Structured outputs: an auto-encoder of the labels that shares the last layer, with and without it.

    python examples/landmarks.py                                   a synthetic task, no data, half a minute
    python examples/landmarks.py --faces FILE                      68 landmarks, three rows, one seed, 2 minutes
    python examples/landmarks.py --faces FILE --rows all --seeds 0 1 2 --out runs.csv --draw runs.svg
    python examples/landmarks.py --runs runs.csv --draw runs.svg   the picture again

FILE is an .npz with, for n faces, `x` (n, 50, 50) uint8 grey crops, `y` (n, 68, 2) points with -1 and 1 at the edges
of the crop, `box` (n, 4) pixels of the crop in the photograph, the same three as `x_tight`, `y_tight`, `box_tight` for
crops that are the points' own box, and `split`, "helen_train", "helen_test" or "afw". No such file comes with the
project: annotations of faces are licensed for research only.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffr_ext.structured import HoldThenFall, StructuredOutput, cumulative, landmark_errors

TRAINING, VALIDATION, CHECKS = 800, 70, 20  # faces, faces, and how often the best model is looked for


# --- faces ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One row of the table: how a net is trained without and with a task."""

    text: str
    faces: int
    tight: bool
    optimizer: str
    steps: int
    batch: int
    task: str = "output"
    weight: float = 1.0
    rate: float = 0.0  # 0: 1e-2 for SGD, 1e-3 for Adam
    others: bool = False  # whether the task also gets the labels, or images, of all other faces

    def base(self) -> tuple[Any, ...]:
        """What the run without the task depends on."""
        return self.faces, self.tight, self.optimizer, self.steps, self.batch, self.rate


# Belharbi et al.'s program has momentum 0.9, rate 1e-3, batches of 10, and a sum over the outputs in the auto-encoder.
# A tenfold rate makes a tenth of the steps do; 13.6 = 136 outputs / 10 then makes the auto-encoder's step theirs.
ROWS = {
    "sgd-800": Setting("tight box, 800 faces, SGD", 800, True, "sgd", 10_000, 10, weight=13.6),
    "sgd-800-weight-1": Setting("the same, weight 1", 800, True, "sgd", 10_000, 10),
    "sgd-800-rate-5e-2": Setting("the same, weight 1, five times the rate", 800, True, "sgd", 10_000, 10, rate=5e-2),
    "sgd-100": Setting(
        "tight, 100 faces, SGD, other labels", 100, True, "sgd", 4_000, 10, weight=13.6, others=True
    ),
    "adam-800": Setting("tight, 800 faces, Adam", 800, True, "adam", 3_000, 50),
    "adam-100": Setting(
        "tight, 100 faces, Adam, other labels", 100, True, "adam", 1_000, 50, weight=10, others=True
    ),
    "adam-20": Setting("tight, 20 faces, Adam, other labels", 20, True, "adam", 1_000, 20, others=True),
    "jittered-800": Setting("jittered box, 800 faces, Adam", 800, False, "adam", 3_000, 50),
    "jittered-100": Setting(
        "jittered, 100 faces, Adam, other labels", 100, False, "adam", 1_000, 50, weight=10, others=True
    ),
    "jittered-100-input": Setting(
        "jittered, 100 faces, Adam, INPUT task, other images", 100, False, "adam", 1_000, 50, "input", others=True
    ),
}  # fmt: skip
SHORT = ("sgd-800", "adam-800", "jittered-800")


@dataclass(frozen=True)
class Faces:
    """Images (n, 2500) in [0, 1], points (n, 136) in about [-1, 1], boxes (n, 4)."""

    x: Tensor
    y: Tensor
    box: Tensor

    def __getitem__(self, rows: Any) -> Faces:
        return Faces(self.x[rows], self.y[rows], self.box[rows])

    def score(self, predicted: Tensor) -> Score:
        """Errors in pixels of the photograph, by the distance of the outer eye corners there."""
        errors = landmark_errors(predicted, self.y, self.box)
        share, area = cumulative(errors)
        return Score(float(errors.mean()), 100 * share, 100 * area)


@dataclass(frozen=True)
class Score:
    """Mean error, % of faces with an error of at most 0.1, % of the area under that curve up to 0.5."""

    nrmse: float
    cdf: float
    auc: float

    def __str__(self) -> str:
        return f"{self.nrmse:.4f} / {self.cdf:.1f} / {self.auc:.1f}"


def load(path: Path, split: str, tight: bool) -> Faces:
    """One part of the file."""
    end = "_tight" if tight else ""
    with np.load(path) as file:
        rows = file["split"] == split
        x, y, box = (file[name + end][rows] for name in ("x", "y", "box"))
    images = torch.from_numpy(x).float().div(255).flatten(1)
    return Faces(images, torch.from_numpy(y).float().flatten(1), torch.from_numpy(box).float())


def network() -> nn.Sequential:
    """2500-256-128-64-136 with the program's initial weights."""
    model = nn.Sequential(
        nn.Linear(2500, 256), nn.Sigmoid(), nn.Linear(256, 128), nn.Sigmoid(), nn.Linear(128, 64), nn.Tanh(),
        nn.Linear(64, 136), nn.Tanh(),
    )  # fmt: skip
    for layer, activation in zip(model[::2], model[1::2], strict=True):
        nn.init.xavier_uniform_(layer.weight, gain=4 if isinstance(activation, nn.Sigmoid) else 1)
        nn.init.zeros_(layer.bias)
    return model


def train(path: Path, setting: Setting, seed: int, with_task: bool) -> Score:
    """Train once; the score on the test faces of the model that was best on the validation faces."""
    torch.manual_seed(seed)
    held, test = load(path, "helen_train", setting.tight), load(path, "helen_test", setting.tight)
    order = torch.randperm(len(held.x))
    faces, others, chosen = (
        held[order[: setting.faces]],
        held[order[setting.faces : TRAINING]],
        held[order[TRAINING : TRAINING + VALIDATION]],
    )
    pool = torch.cat([getattr(f, "x" if setting.task == "input" else "y")
                      for f in (others, load(path, "afw", setting.tight))])  # fmt: skip
    model = network()
    kind = {"first": model[:2]} if setting.task == "input" else {"last": model[5:]}
    weights = {"input": 0.0, "output": 0.0, setting.task: setting.weight if with_task else 0.0}
    tasks = StructuredOutput(model, **kind, **weights)
    fall = HoldThenFall(
        tasks,
        fall_from=setting.steps // 10,
        stop=setting.steps * (5 if setting.task == "input" else 7) // 10,
        weights=setting.task,
    )
    parameters = [*model.parameters(), *tasks.parameters()]
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(parameters, lr=setting.rate or 1e-2, momentum=0.9)
        if setting.optimizer == "sgd"
        else torch.optim.Adam(parameters, lr=setting.rate or 1e-3)
    )
    best, state = float("inf"), model.state_dict()
    for step in range(1, setting.steps + 1):
        rows = torch.randint(len(faces.x), (setting.batch,))
        x, y = faces.x[rows], faces.y[rows]
        seen = x if setting.task == "input" else y
        if with_task and setting.others:
            # As many as pass all of them in the time in which all faces pass.
            count = setting.batch * len(pool) // len(faces.x)
            seen = torch.cat([seen, pool[torch.randint(len(pool), (count,))]])
        loss = F.mse_loss(model(x), y)
        loss = loss + (tasks.loss(x=seen) if setting.task == "input" else tasks.loss(y=seen))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()
        if step % (setting.steps // CHECKS) == 0:
            error = chosen.score(predict(model, chosen.x)).nrmse
            if error < best:
                best, state = error, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return test.score(predict(model, test.x))


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Points of all images."""
    result: Tensor = model(x)
    return result


def mean_shape(path: Path, tight: bool = True) -> Score:
    """What is reached without looking at the image."""
    held, test = load(path, "helen_train", tight), load(path, "helen_test", tight)
    return test.score(held.y[:TRAINING].mean(0).expand_as(test.y))


def table(path: Path, names: Sequence[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Train every row with every seed, print as it goes, and return a row a run."""
    print(f"mean shape, tight box: {mean_shape(path)}   (NRMSE / CDF 0.1 in % / AUC in %, on 330 test faces)")
    without: dict[tuple[Any, ...], Score] = {}
    runs = []
    for name in names:
        setting = ROWS[name]
        for seed in seeds:
            start = time.perf_counter()
            key = (*setting.base(), seed)
            if key not in without:
                without[key] = train(path, setting, seed, with_task=False)
            score = train(path, setting, seed, with_task=True)
            seconds = time.perf_counter() - start
            print(
                f"{name:20} seed {seed}  without {without[key]}   with {score}   {seconds:.0f} s", flush=True
            )
            for task, value in (("without", without[key]), ("with", score)):
                runs.append({"row": name, "seed": seed, "task": task, **vars(value)})
    print("\n" + markdown(runs))
    return runs


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """Means over seeds, one line a row."""
    lines = [
        "| setting | without: NRMSE / CDF 0.1 / AUC | with the task | seeds |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(run["row"] for run in runs):
        cells = []
        for task in ("without", "with"):
            chosen = [run for run in runs if run["row"] == name and run["task"] == task]
            cells.append(
                str(Score(*(statistics.mean(run[key] for run in chosen) for key in ("nrmse", "cdf", "auc"))))
            )
        lines.append(f"| {ROWS[name].text} | {cells[0]} | {cells[1]} | {len(chosen)} |")
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Error without and with the task, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    # The same ids, so that the same runs give the same file; and text as text, half the size.
    matplotlib.rcParams.update({"svg.hashsalt": "landmarks", "svg.fonttype": "none"})
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(run["row"] for run in runs))
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.45 * len(names)), layout="constrained")
    errors: dict[str, list[float]] = {"without": [], "with": []}
    heights = []
    for place, name in enumerate(names):
        chosen = [run for run in runs if run["row"] == name]
        count = len(chosen) // 2
        heights += [-place + 0.2 * ((count - 1) / 2 - index) for index in range(count)]
        for task, values in errors.items():
            values += [run["nrmse"] for run in chosen if run["task"] == task]
    axes.hlines(heights, errors["without"], errors["with"], color="#cccccc", zorder=1)
    axes.plot(errors["without"], heights, "o", markersize=4, color="#7f7f7f", label="without")
    axes.plot(errors["with"], heights, "o", markersize=4, color="#d95f02", label="with the task")
    axes.set_yticks([-place for place in range(len(names))], [ROWS[name].text for name in names])
    axes.set(xlabel="NRMSE, 330 test faces; a line a seed")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """What --out has written."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{**row, **{key: float(row[key]) for key in ("nrmse", "cdf", "auc")}} for row in rows]


def write_runs(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """A row a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(runs[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: round(v, 5) if isinstance(v, float) else v for k, v in run.items()} for run in runs
        )


# --- the synthetic task ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Subspace:
    """Of a linear net that learnt from 6 noisy pairs of 3 in 40 dimensions: the share of its predictions outside the
    3, and the test error by the variance of the labels."""

    outside: float
    error: float


def subspace(seed: int, weight: float, steps: int = 3000, pairs: int = 6, label_only: int = 500) -> Subspace:
    """The regime the method is for: labels in a subspace, noise on them, few pairs, many labels without an input."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    basis = torch.linalg.qr(normal(40, 3)).Q
    mixing = normal(10, 3) / 10**0.5

    def sample(n: int) -> tuple[Tensor, Tensor]:
        x = normal(n, 10)
        return x, x @ mixing @ basis.T + 0.3 * normal(n, 40)

    (x, y), (_, y_all), (test_x, test_y) = sample(pairs), sample(label_only), sample(1000)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 3, bias=False), nn.Linear(3, 40, bias=False))
    tasks = StructuredOutput(model, last=model[1:], output=weight)
    optimizer = torch.optim.Adam([*model.parameters(), *tasks.parameters()], lr=1e-2)
    for _ in range(steps):
        loss = F.mse_loss(model(x), y) + tasks.loss(y=y_all)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    predicted = predict(model, test_x)
    outside = predicted - predicted @ basis @ basis.T
    return Subspace(
        float(outside.norm() / predicted.norm()), float(F.mse_loss(predicted, test_y) / test_y.var())
    )


def synthetic(seeds: Sequence[int], steps: int) -> dict[float, list[Subspace]]:
    """The net without the task, with weight 1 and with weight 10."""
    print("6 pairs, 500 labels without input, labels in 3 of 40 dimensions plus noise")
    print("weight  share of the prediction outside the 3 dimensions  test error / variance of the labels")
    results = {}
    for weight in (0.0, 1.0, 10.0):
        results[weight] = [subspace(seed, weight, steps) for seed in seeds]
        shares = " ".join(f"{result.outside:.2f}" for result in results[weight])
        errors = " ".join(f"{result.error:.2f}" for result in results[weight])
        print(f"{weight:6g}  {shares:48}  {errors}", flush=True)
    return results


def main(argv: list[str] | None = None) -> Any:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--faces", type=Path, help="the .npz; without it the synthetic task is run")
    arguments.add_argument(
        "--rows",
        nargs="+",
        default=list(SHORT),
        choices=[*ROWS, "all"],
        metavar="ROW",
        help=f"of the table: all, or some of {', '.join(ROWS)}",
    )
    arguments.add_argument(
        "--seeds", type=int, nargs="+", help="default: 0 for faces, 0 to 4 for the synthetic task"
    )
    arguments.add_argument("--steps", type=int, default=3000, help="of the synthetic task")
    arguments.add_argument("--out", type=Path, help="write a row a run into this .csv")
    arguments.add_argument("--runs", type=Path, help="read the runs of an earlier --out instead of training")
    arguments.add_argument(
        "--draw", type=Path, help="draw the runs into this .svg or .png (needs matplotlib)"
    )
    options = arguments.parse_args(argv)
    torch.set_num_threads(1)
    for name, path in (("--faces", options.faces), ("--runs", options.runs)):
        if path is not None and not path.is_file():
            sys.exit(f"{name}: no file {path}")
    if options.faces is None and options.runs is None:
        return synthetic(options.seeds or range(5), options.steps)
    if options.runs:
        runs = read_runs(options.runs)
        print(markdown(runs))
    else:
        runs = table(
            options.faces, list(ROWS) if "all" in options.rows else options.rows, options.seeds or [0]
        )
    if options.out:
        write_runs(runs, options.out)
    if options.draw:
        draw(runs, options.draw)
    return runs


if __name__ == "__main__":
    main()
