"""Train over weights, epochs and seeds; collect one row a run, and draw dead filters and accuracy against
the weight.

    python examples/sweep.py --weights 0 1 3 --epochs 120 200 --seeds 0 1 2 --out runs/sweep

Rows are appended to runs.csv in --out, and runs that are there already are skipped, so a sweep can be
stopped and continued, or spread over several calls.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import plots
from common.data import Images, load
from common.filters import DEAD
from train import Config, Run

from ffr_ext import __version__, backends, zero_small_filters

KEYS = ("model", "weight", "norm", "epochs", "seed")


def one_run(config: Config, images: Images) -> dict[str, Any]:
    """Train once; accuracy, dead filters, and the accuracy once those are switched off for good."""
    start = time.perf_counter()
    run = Run(config, images)
    run.train()
    last = run.history[-1]
    zero_small_filters(run.model, DEAD)
    return {
        "model": config.model,
        "weight": config.ffr_gradient,
        "norm": config.norm,
        "epochs": config.epochs,
        "seed": config.seed,
        "filters": last.filters,
        "dead_filters": last.dead_filters,
        "dead_share": round(last.dead_filters / last.filters, 4),
        "test_accuracy": round(last.test_accuracy, 4),
        "accuracy_without_dead": round(run.test()[1], 4),
        "train_loss": round(last.loss, 6),
        "seconds": round(time.perf_counter() - start, 1),
        "backend": backends.resolve(config.backend, "cpu"),
        **environment(),
    }


def environment() -> dict[str, str]:
    """Machine, versions and commit, so that a row can be judged later."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    return {
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ffr_ext": __version__,
        "commit": commit or "unknown",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def append_row(path: Path, row: dict[str, Any]) -> None:
    new = not path.is_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds for each weight and number of epochs."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["norm"], row["epochs"], row["weight"]), []).append(row)
    table = []
    for (model, norm, epochs, weight), members in sorted(groups.items()):
        entry = {"model": model, "norm": norm, "epochs": epochs, "weight": weight, "seeds": len(members)}
        for key in ("dead_filters", "dead_share", "test_accuracy", "accuracy_without_dead"):
            entry[f"mean_{key}"] = round(sum(row[key] for row in members) / len(members), 4)
        table.append(entry)
    return table


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Config(method="ffr")
    arguments.add_argument("--weights", type=float, nargs="+", default=[0.0, 1.0, 3.0])
    arguments.add_argument("--epochs", type=int, nargs="+", default=[default.epochs])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--model", default=default.model)
    arguments.add_argument("--norm", default=default.norm)
    arguments.add_argument("--backend", default=default.backend)
    arguments.add_argument("--threads", type=int, default=default.threads)
    arguments.add_argument("--out", type=Path, default=Path("runs/sweep"))
    options = arguments.parse_args(argv)
    images, path = load("digits"), options.out / "runs.csv"
    for epochs, seed, weight in product(options.epochs, options.seeds, options.weights):
        key = (options.model, weight, options.norm, epochs, seed)
        if any(tuple(row[name] for name in KEYS) == key for row in read_rows(path)):
            continue
        config = replace(
            default,
            epochs=epochs,
            seed=seed,
            ffr_gradient=weight,
            ffr_curvature=weight,
            model=options.model,
            norm=options.norm,
            backend=options.backend,
            threads=options.threads,
        )
        row = one_run(config, images)
        append_row(path, row)
        print(
            f"weight {weight:g}, {epochs} epochs, seed {seed}: {row['dead_filters']} of {row['filters']} "
            f"filters dead, "
            f"test accuracy {row['test_accuracy']:.2%}, {row['seconds']} s",
            flush=True,
        )
    rows = read_rows(path)
    means = summary(rows)
    (options.out / "summary.csv").unlink(missing_ok=True)
    for entry in means:
        append_row(options.out / "summary.csv", entry)
    plots.sweep(rows, options.out / "sweep.png")
    return means


if __name__ == "__main__":
    main()
