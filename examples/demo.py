"""Watch filters vanish: the same network trained without a penalty, with feature flow regularization (FFR), and with
FFR and an l1 penalty of the norms' scales, the recipe that docs/arena.md ends with.

    make demo                                # sets everything up first
    python examples/demo.py                  # in an environment with ffr-ext[demo]
    python examples/demo.py --epochs 200     # longer: most of the filters die

Trains ResNet-20 on the handwritten digits that come with scikit-learn (1,437 images of 8x8 pixels), prints
what became of the filters, and draws pictures into runs/demo. Takes minutes on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import plots
from common.data import Images, load
from common.filters import DEAD, Pruned, prune
from common.methods import FFR_WEIGHTS, WEIGHTS
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from train import Config, Run, write_csv

WITHOUT, WITH, BOTH = "without FFR", "with FFR", "FFR + scales"


def train_all(configs: dict[str, Config], images: Images, console: Console) -> dict[str, Run]:
    """Train from the same seed on the same batches, each in a process of its own, side by side."""
    epochs = next(iter(configs.values())).epochs
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[accuracy]:6.1%} right, {task.fields[dead]:3d}/{task.fields[filters]} dead"),
        TimeRemainingColumn(),
    )
    # Spawned, because a forked process must not use the parent's OpenMP threads.
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as folder:
        messages = context.Queue()
        paths = {label: Path(folder) / f"{number}.pt" for number, label in enumerate(configs)}
        tasks = {
            label: progress.add_task(label, total=epochs, accuracy=0.0, dead=0, filters=0)
            for label in configs
        }
        processes = [
            context.Process(
                target=train_one, args=(label, configs[label], paths[label], messages), daemon=True
            )
            for label in configs
        ]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes) or not messages.empty():
            try:
                label, accuracy, dead, filters = messages.get(timeout=0.5)
            except queue.Empty:
                continue
            progress.update(tasks[label], advance=1, accuracy=accuracy, dead=dead, filters=filters)
        if any(process.exitcode for process in processes):
            raise RuntimeError("a training process failed; its message is above")
        return {label: Run.resume(path, images) for label, path in paths.items()}


def train_one(label: str, config: Config, path: Path, messages: Any) -> None:
    """Train in a process of its own, report every epoch, and leave the run at ``path``."""
    run = Run(config)
    run.train(lambda epoch: messages.put((label, epoch.test_accuracy, epoch.dead_filters, epoch.filters)))
    run.save(path)


def layer_table(results: dict[str, Pruned]) -> Table:
    """Dead filters per layer and in all."""
    table = Table(title=f"Filters with an effective scale of at most {DEAD:g}")
    table.add_column("convolution", no_wrap=True)
    table.add_column("filters", justify="right")
    for label in results:
        table.add_column(f"dead, {label}", justify="right")
    for rows in zip(*(result.filters for result in results.values()), strict=True):
        table.add_row(rows[0].name, str(rows[0].filters), *(str(row.zero_filters) for row in rows))
    table.add_section()
    total = next(iter(results.values())).total
    table.add_row("all", str(total), *(_share(r.dead, total) for r in results.values()), style="bold")
    return table


def network_table(runs: dict[str, Run], results: dict[str, Pruned]) -> Table:
    """Accuracy, zero weights, and the networks before and after their dead filters are cut out."""
    table = Table(title="The networks, and what is left when the dead filters are cut out")
    table.add_column("")
    for label in runs:
        table.add_column(label, justify="right")
    reports = [result.compaction.report for result in results.values()]
    before = [run.history[-1].test_accuracy for run in runs.values()]
    after = [run.accuracy(results[label].compaction.model) for label, run in runs.items()]
    weights = sum(layer.weights for layer in next(iter(results.values())).filters)
    zeros = [result.zero_weights for result in results.values()]
    table.add_row("test accuracy", *(f"{value:.1%}" for value in before), style="bold")
    table.add_row("test accuracy, smaller network", *(f"{value:.1%}" for value in after), style="bold")
    table.add_row("zero weights, dead filters zeroed", *(_share(value, weights) for value in zeros))
    table.add_row("parameters", *(f"{report.parameters[0]:,}" for report in reports))
    table.add_row("parameters that could go, and went", *(_gone(report.parameters) for report in reports))
    table.add_row("FLOPs for 8 images", *(f"{report.flops[0]:,}" for report in reports))
    table.add_row("FLOPs that could go, and went", *(_gone(report.flops) for report in reports))
    table.add_row("largest change of an output", *(f"{report.max_error:.1g}" for report in reports))
    return table


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def _gone(sizes: tuple[int, int]) -> str:
    return _share(sizes[0] - sizes[1], sizes[0])


def write_results(runs: dict[str, Run], results: dict[str, Pruned], folder: Path) -> list[Path]:
    """CSV logs of the runs, the tables, and the pictures."""
    for label, run in runs.items():
        run.write_logs(folder / label.replace(" + ", "_").replace(" ", "_"))
    filters = [
        {"run": label, "layer": row.name, "filters": row.filters, "dead": row.zero_filters}
        for label, result in results.items()
        for row in result.filters
    ]
    networks = []
    for label, result in results.items():
        report, run = result.compaction.report, runs[label]
        networks.append(
            {
                "run": label,
                "filters": result.total,
                "dead_filters": result.dead,
                "zero_weights": result.zero_weights,
                "test_accuracy": run.history[-1].test_accuracy,
                "test_accuracy_smaller": run.accuracy(result.compaction.model),
                "parameters": report.parameters[0],
                "parameters_smaller": report.parameters[1],
                "flops": report.flops[0],
                "flops_smaller": report.flops[1],
                "largest_output_change": report.max_error,
            }
        )
    files = [folder / f"{name}.png" for name in ("filters_alive", "pruned", "flow_terms", "training")]
    files += [folder / "filters.csv", folder / "networks.csv"]
    write_csv(files[-2], filters)
    write_csv(files[-1], networks)
    plots.filters_alive({label: result.filters for label, result in results.items()}, files[0])
    plots.pruned(results, files[1])
    plots.flow_terms({label: run.terms for label, run in runs.items()}, files[2])
    plots.training({label: run.history for label, run in runs.items()}, files[3])
    return files


def main(argv: list[str] | None = None) -> dict[str, Run]:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Config()
    arguments.add_argument("--epochs", type=int, default=default.epochs)
    arguments.add_argument("--model", default=default.model, help=f"default {default.model}")
    arguments.add_argument(
        "--weight", type=float, default=FFR_WEIGHTS["ffr"], help="of length and curvature, of FFR alone"
    )
    arguments.add_argument("--seed", type=int, default=default.seed)
    arguments.add_argument(
        "--threads", type=int, default=1, help="of each training; more hardly help images this small"
    )
    arguments.add_argument("--backend", default=default.backend, help="see ffr_loss")
    arguments.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = arguments.parse_args(argv)
    config = replace(
        default,
        epochs=options.epochs,
        model=options.model,
        seed=options.seed,
        threads=options.threads,
        backend=options.backend,
    )
    configs = {
        WITHOUT: replace(config, method="none", ffr_gradient=0.0, ffr_curvature=0.0),
        WITH: replace(config, method="ffr", ffr_gradient=options.weight, ffr_curvature=options.weight),
        BOTH: config,
    }
    console = Console()
    images = load("digits")
    console.print(
        f"{config.model} on {len(images.train_x)} handwritten digits, {config.epochs} epochs, "
        f"FFR weights {options.weight:g} (length and curvature); with scales {config.ffr_gradient:g}, and "
        f"{WEIGHTS[config.method]:g} for the scales; seed {config.seed}"
    )
    start = time.perf_counter()
    runs = train_all(configs, images, console)
    results = {label: prune(run.model, images.test_x[:8]) for label, run in runs.items()}
    console.print(layer_table(results))
    console.print(network_table(runs, results))
    for file in write_results(runs, results, options.out):
        console.print(f"wrote {file}")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    return runs


if __name__ == "__main__":
    main()
