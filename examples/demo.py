"""Watch feature flow regularization make filters vanish: the same network trained without it and with it.

    make demo                                # sets everything up first
    python examples/demo.py                  # in an environment with ffr-ext[demo]
    python examples/demo.py --epochs 200     # longer: most of the filters die

Trains ResNet-20 on the handwritten digits that come with scikit-learn (1,437 images of 8x8 pixels), prints
what became of the filters, and draws pictures into runs/demo. Takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import asdict, replace
from pathlib import Path

import plots
from data import Images, load
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from sparsity_report import DEAD, Layer, report
from train import Config, Epoch, Run

WITHOUT, WITH = "without FFR", "with FFR"


def train_both(config: Config, images: Images, console: Console) -> dict[str, Run]:
    """Train twice from the same seed, on the same batches, without and with the penalty."""
    runs = {
        WITHOUT: Run(replace(config, ffr_gradient=0.0, ffr_curvature=0.0), images),
        WITH: Run(config, images),
    }
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(
            "accuracy {task.fields[accuracy]:6.1%}  dead filters "
            "{task.fields[dead]:3d}/{task.fields[filters]}"
        ),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for label, run in runs.items():
            task = progress.add_task(label, total=config.epochs, accuracy=0.0, dead=0, filters=0)

            def after_epoch(epoch: Epoch, task: int = task) -> None:  # type: ignore[assignment]
                progress.update(
                    task,
                    advance=1,
                    accuracy=epoch.test_accuracy,
                    dead=epoch.dead_filters,
                    filters=epoch.filters,
                )

            run.train(after_epoch)
    return runs


def layer_table(layers: dict[str, list[Layer]], accuracy: dict[str, float]) -> Table:
    """Dead filters per layer and in all, and the share of parameters and FLOPs that are theirs."""
    table = Table(title=f"Filters with an effective scale under {DEAD:g}")
    table.add_column("convolution")
    table.add_column("filters", justify="right")
    for label in layers:
        table.add_column(f"dead, {label}", justify="right")
    for rows in zip(*layers.values(), strict=True):
        table.add_row(rows[0].name, str(rows[0].filters), *(str(row.dead) for row in rows))
    table.add_section()
    chosen = list(layers.values())
    total = sum(row.filters for row in chosen[0])
    table.add_row(
        "all", str(total), *(_share(sum(r.dead for r in rows), total) for rows in chosen), style="bold"
    )
    for name, what in (("parameters that could go", "weights"), ("FLOPs that could go", "flops")):
        everything = sum(getattr(row, what) for row in chosen[0])
        gone = [sum(getattr(row, f"removable_{what}") for row in rows) for rows in chosen]
        table.add_row(name, f"{everything:,}", *(_share(value, everything) for value in gone))
    table.add_row("test accuracy", "", *(f"{accuracy[label]:.1%}" for label in layers), style="bold")
    return table


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def write_results(runs: dict[str, Run], layers: dict[str, list[Layer]], folder: Path) -> None:
    """CSV logs of both runs, the table, and the pictures."""
    for label, run in runs.items():
        run.write_logs(folder / label.replace(" ", "_"))
    with (folder / "filters.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *asdict(layers[WITH][0])])
        writer.writerows([label, *asdict(row).values()] for label, rows in layers.items() for row in rows)
    plots.filters_alive(layers, folder / "filters_alive.png")
    plots.flow_terms({label: run.terms for label, run in runs.items()}, folder / "flow_terms.png")
    plots.training({label: run.history for label, run in runs.items()}, folder / "training.png")


def main(argv: list[str] | None = None) -> dict[str, Run]:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Config()
    arguments.add_argument("--epochs", type=int, default=default.epochs)
    arguments.add_argument("--model", default=default.model, help=f"default {default.model}")
    arguments.add_argument(
        "--weight", type=float, default=default.ffr_gradient, help="of length and curvature"
    )
    arguments.add_argument("--seed", type=int, default=default.seed)
    arguments.add_argument("--threads", type=int, default=default.threads, help="0: what torch chooses")
    arguments.add_argument("--backend", default=default.backend, help="see ffr_loss")
    arguments.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = arguments.parse_args(argv)
    config = replace(
        default,
        epochs=options.epochs,
        model=options.model,
        ffr_gradient=options.weight,
        ffr_curvature=options.weight,
        seed=options.seed,
        threads=options.threads,
        backend=options.backend,
    )
    console = Console()
    images = load("digits")
    console.print(
        f"{config.model} on {len(images.train_x)} handwritten digits, {config.epochs} epochs, "
        f"FFR weights {config.ffr_gradient:g} (length) and {config.ffr_curvature:g} (curvature), seed "
        f"{config.seed}"
    )
    start = time.perf_counter()
    runs = train_both(config, images, console)
    layers = {label: report(run.model, images.test_x) for label, run in runs.items()}
    accuracy = {label: run.history[-1].test_accuracy for label, run in runs.items()}
    console.print(layer_table(layers, accuracy))
    write_results(runs, layers, options.out)
    for name in ("filters_alive.png", "flow_terms.png", "training.png", "filters.csv"):
        console.print(f"wrote {options.out / name}")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
