"""The pictures of an arena, from the rows of its CSV."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Rows, summary


def draw(rows: Rows, folder: Path, name: str) -> list[Path]:
    """Accuracy against FLOPs after the cut and fine-tuned, filters alive by layer, cost against what it gained."""
    paths = [
        _accuracy(rows, folder / f"{name}.png", finetuned=False),
        _accuracy(rows, folder / f"{name}-finetuned.png", finetuned=True),
        _filters(rows, folder / f"{name}-filters.png"),
        _cost(rows, folder / f"{name}-cost.png"),
    ]
    return [path for path in paths if path.exists()]


def _axes(width: float = 8, height: float = 5) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def _style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}


def _accuracy(rows: Rows, path: Path, finetuned: bool) -> Path:
    """A line a method through its means, a dot a seed."""
    figure, axes = _axes()
    entries = [e for e in summary(rows) if bool(e["finetuned"]) == finetuned and e["seeds"]]
    for number, method in enumerate(dict.fromkeys(e["method"] for e in entries)):
        line = sorted((100 * e["flops_left"], 100 * e["accuracy"]) for e in entries if e["method"] == method)
        axes.plot(*zip(*line, strict=True), **_style(number), marker="o", markersize=4, label=method)
        dots = [
            (100 * row["flops_left"], 100 * row["accuracy"])
            for row in rows
            if (row["method"], bool(row["finetuned"])) == (method, finetuned)
            and isinstance(row.get("accuracy"), float)
        ]
        axes.plot(*zip(*dots, strict=True), ".", color=_style(number)["color"], alpha=0.6)
    axes.set(xscale="log", xlabel="FLOPs left, %", ylabel="test accuracy, %")
    axes.set_title("fine-tuned after the cut" if finetuned else "right after the cut")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, path)


def _filters(rows: Rows, path: Path) -> Path:
    """Outputs that each layer keeps in what died by itself, of the first seed."""
    died = [r for r in rows if r["cut"] == "died" and not r["finetuned"] and r.get("filters")]
    first = min(row["seed"] for row in died)
    kept = {row["method"]: _counts(row) for row in died if row["seed"] == first}
    layers: Sequence[str] = max(kept.values(), key=len)
    figure, axes = _axes(8, 0.35 * len(kept) + 2)
    shares = [[counts.get(layer, 0) for layer in layers] for counts in kept.values()]
    widest = [max(column) or 1 for column in zip(*shares, strict=True)]
    image = [[n / w for n, w in zip(row, widest, strict=True)] for row in shares]
    axes.imshow(image, cmap="Greens", vmin=0, vmax=1.3, aspect="auto")
    for y, row in enumerate(shares):
        for x, count in enumerate(row):
            axes.text(x, y, str(count), ha="center", va="center", fontsize=7)
    axes.set_yticks(range(len(kept)), list(kept))
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_title("filters left by layer; 0: the whole layer is gone")
    return _save(figure, path)


def _counts(row: dict[str, Any]) -> dict[str, int]:
    filters = row["filters"]
    return json.loads(filters) if isinstance(filters, str) else filters


def _cost(rows: Rows, path: Path) -> Path:
    """Added time of a training step against the FLOPs that are left of what died."""
    figure, axes = _axes(7, 4.5)
    for number, e in enumerate(e for e in summary(rows) if e["cut"] == "died" and not e["finetuned"]):
        if not e["seeds"]:
            continue
        point = (100 * e["added_time"], 100 * e["flops_left"])
        axes.plot(*point, "o", color=_style(number)["color"])
        axes.annotate(
            f"{e['method']} ({100 * e['accuracy']:.1f} %)",
            point,
            (4, 3),
            textcoords="offset points",
            fontsize=7,
        )
    axes.set(yscale="log", xlabel="added time of a training step, %", ylabel="FLOPs left of what died, %")
    axes.grid(alpha=0.3)
    return _save(figure, path)
