"""Pictures of training runs. Colours: grey without, orange with FFR, green with FFR + scales; darker is deeper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")  # files only: demo and tests run without a display
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from train import Epoch

    from ffr_ext import LayerSparsity

    from .filters import Pruned

WITH, WITHOUT, BOTH = "#d95f02", "#7f7f7f", "#1b9e77"
COLORS = (WITHOUT, WITH, BOTH)
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 120})


def filters_alive(layers: dict[str, Sequence[LayerSparsity]], path: Path) -> None:
    """Filters alive in every layer at the end of training, one group of bars a layer, next to all there
    are."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    names = [layer.name for layer in next(iter(layers.values()))]
    every = [layer.filters for layer in next(iter(layers.values()))]
    positions = range(len(names))
    axes.bar(positions, every, width=0.92, color="#eeeeee", label="all filters")
    for index, (label, chosen) in enumerate(layers.items()):
        width = 0.8 / len(layers)
        offset = (index - (len(layers) - 1) / 2) * width
        alive = [layer.filters - layer.zero_filters for layer in chosen]
        total = f"{label}: {sum(alive)} of {sum(every)} alive"
        axes.bar([p + offset for p in positions], alive, 0.95 * width, color=COLORS[index % 3], label=total)
    axes.set_xticks(list(positions), [_short(name) for name in names], rotation=60, ha="right")
    axes.set(xlabel="convolution", ylabel="filters", title="Filters alive after training")
    axes.legend(frameon=False, loc="upper left")
    _save(figure, path)


def pruned(results: dict[str, Pruned], path: Path) -> None:
    """What is left of parameters and FLOPs once the dead filters are cut out."""
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for index, (label, result) in enumerate(results.items()):
        report = result.compaction.report
        shares = [after / before for before, after in (report.parameters, report.flops)]
        width = 0.76 / len(results)
        positions = [position + (index - (len(results) - 1) / 2) * width for position in range(len(shares))]
        bars = axes.bar(
            positions, [100 * share for share in shares], 0.95 * width, color=COLORS[index % 3], label=label
        )
        axes.bar_label(bars, [f"{100 * share:.0f} %" for share in shares])
    axes.set_xticks(range(2), ["parameters", "FLOPs"])
    axes.set(ylabel="% left", title="After cutting out the dead filters (same outputs)", ylim=(0, 118))
    axes.legend(frameon=False, loc="upper center", ncols=3)
    _save(figure, path)


def flow_terms(terms: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Length and curvature of the feature flow on the test images, term by term, over training."""
    kinds = ("length", "curvature")
    figure, grid = plt.subplots(
        2,
        len(terms),
        figsize=(4.5 * len(terms), 5.4),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for column, (label, rows) in enumerate(terms.items()):
        for axes, kind in zip(grid[:, column], kinds, strict=True):
            curves: dict[int, tuple[list[int], list[float]]] = {}
            for row in rows:
                if row["kind"] == kind:
                    xs, ys = curves.setdefault(row["term"], ([], []))
                    xs.append(row["epoch"])
                    ys.append(row["value"])
            shades = plt.get_cmap("viridis_r")
            for term, (xs, ys) in curves.items():
                axes.plot(
                    xs, ys, color=shades(0.1 + 0.9 * term / max(len(curves) - 1, 1)), lw=1.2, label=str(term)
                )
            axes.set_yscale("log")
            axes.set_ylabel(f"{kind} (mean |difference|)" if column == 0 else "")
            axes.set_title(label if kind == kinds[0] else "")
        grid[1, column].set_xlabel("epoch")
    for row, kind in enumerate(kinds):
        if grid[row, -1].lines:
            grid[row, -1].legend(
                title=f"{kind} term", frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5)
            )
    figure.suptitle("The feature flow during training (test images)")
    _save(figure, path)


def training(histories: dict[str, Sequence[Epoch]], path: Path) -> None:
    """Accuracy, loss and dead filters over training."""
    figure, (accuracy, loss, dead) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for index, (label, history) in enumerate(histories.items()):
        color = COLORS[index % 3]
        epochs = [row.epoch for row in history]
        accuracy.plot(epochs, [100 * row.test_accuracy for row in history], color=color, label=label)
        loss.plot(epochs, [row.loss for row in history], color=color, label=f"{label}, training")
        loss.plot(epochs, [row.test_loss for row in history], color=color, ls=":", label=f"{label}, test")
        dead.plot(epochs, [row.dead_filters for row in history], color=color, label=label)
    accuracy.set(xlabel="epoch", ylabel="%", title="Test accuracy", ylim=(80, 100.5))
    loss.set(xlabel="epoch", title="Cross-entropy", yscale="log")
    dead.set(xlabel="epoch", title="Dead filters", ylim=(0, None))
    for axes in (accuracy, loss, dead):
        axes.legend(frameon=False, fontsize=7)
    _save(figure, path)


def sweep(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Weight of FFR against dead filters and accuracy; every point a seed, lines through the means."""
    weights = sorted({row["weight"] for row in rows})
    positions = {weight: index for index, weight in enumerate(weights)}
    figure, both = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharex=True)
    quantities = (("dead_share", "Filters dead, %"), ("test_accuracy", "Test accuracy, %"))
    for axes, (key, title) in zip(both, quantities, strict=True):
        for index, epochs in enumerate(sorted({row["epochs"] for row in rows})):
            chosen = [row for row in rows if row["epochs"] == epochs]
            color = (WITH, "#1b9e77", "#7570b3")[index % 3]
            axes.scatter(
                [positions[row["weight"]] for row in chosen], [100 * row[key] for row in chosen], 12, color
            )
            means = []
            for weight in sorted({row["weight"] for row in chosen}):
                values = [100 * row[key] for row in chosen if row["weight"] == weight]
                means.append((positions[weight], sum(values) / len(values)))
            axes.plot(*zip(*means, strict=True), color=color, lw=1, label=f"{epochs} epochs")
        axes.set(xlabel="weight of both terms (0: without FFR)", title=title)
        axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
        axes.legend(frameon=False)
    _save(figure, path)


def _short(name: str) -> str:
    return name.removeprefix("stages.").removeprefix("features.")


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
