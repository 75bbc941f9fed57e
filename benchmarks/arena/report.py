"""The table, the CSV and the pictures of an arena."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

COLUMNS = [
    *("data", "model", "method", "kind", "strength", "seed", "epochs", "cut", "finetuned"),
    *("accuracy_whole", "accuracy", "flops_left", "parameters_left", "latency_left", "latency_ms"),
    *("blocks_removed", "layers_removed", "max_error"),
    *("training_seconds", "added_time", "peak_memory_mib", "note"),
    *("commit", "torch", "processor"),
]
AVERAGED = ("accuracy", "flops_left", "parameters_left", "latency_left", "blocks_removed", "added_time")
Rows = Sequence[dict[str, Any]]


def write_csv(rows: Rows, path: Path, about: dict[str, Any]) -> None:
    """All rows, each with the commit, versions and machine that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**about, **rounded})


def read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def summary(rows: Rows) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of every method, cut and amount of fine-tuning."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["cut"], row["finetuned"]].append(row)
    result = []
    for (method, cut, finetuned), members in groups.items():
        done = [row for row in members if isinstance(row.get("accuracy"), float)]
        entry: dict[str, Any] = {"method": method, "cut": cut, "finetuned": finetuned, "seeds": len(done)}
        entry |= {"kind": members[0]["kind"], "strength": members[0]["strength"]}
        for name in AVERAGED:
            values = [row[name] for row in done]
            entry[name] = mean(values) if values else math.nan
            entry[f"{name}_spread"] = stdev(values) if len(values) > 1 else 0.0
        result.append(entry)
    return result


def front(entries: Rows) -> set[str]:
    """The methods that no other beats in both accuracy and FLOPs left."""
    known = [e for e in entries if e["seeds"]]
    return {
        e["method"]
        for e in known
        if not any(
            o["accuracy"] >= e["accuracy"]
            and o["flops_left"] <= e["flops_left"]
            and (o["accuracy"], -o["flops_left"]) != (e["accuracy"], -e["flops_left"])
            for o in known
        )
    }


def table(rows: Rows, finetuned: bool) -> str:
    """Markdown: a line a method; what died by itself, then the accuracy at each budget."""
    entries = [e for e in summary(rows) if bool(e["finetuned"]) == finetuned]
    cuts = list(dict.fromkeys(e["cut"] for e in entries))
    budgets = [cut for cut in cuts if cut != "died"]
    best = front([e for e in entries if e["cut"] == "died"])
    of_died = [
        "died by itself: accuracy, %",
        "FLOPs left, %",
        "parameters left, %",
        "blocks removed",
        "added time a step",
    ]
    heads = ["method", "removes", *of_died, *(f"at {float(cut):.0%} of the FLOPs, %" for cut in budgets)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method in dict.fromkeys(e["method"] for e in entries):
        of = {e["cut"]: e for e in entries if e["method"] == method}
        died = of.get("died")
        cells = [f"**{method}**" if method in best else method, next(iter(of.values()))["kind"]]
        if died is not None and died["seeds"]:
            cells += [
                _percent(died, "accuracy"),
                _percent(died, "flops_left"),
                _percent(died, "parameters_left"),
            ]
            cells += [f"{died['blocks_removed']:.1f}", f"{died['added_time']:+.0%}"]
        else:
            cells += ["-"] * 5
        cells += [
            _percent(of[cut], "accuracy") if cut in of and of[cut]["seeds"] else "not reached"
            for cut in budgets
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(entry: dict[str, Any], name: str) -> str:
    spread = f" ± {100 * entry[f'{name}_spread']:.1f}" if entry["seeds"] > 1 else ""
    return f"{100 * entry[name]:.1f}{spread}"


def draw(rows: Rows, path: Path, finetuned: bool) -> None:
    """Accuracy against FLOPs: a line a method through its means, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    entries = [e for e in summary(rows) if bool(e["finetuned"]) == finetuned and e["seeds"]]
    for number, method in enumerate(dict.fromkeys(e["method"] for e in entries)):
        color = f"C{number % 10}"
        line = sorted((e["flops_left"], e["accuracy"]) for e in entries if e["method"] == method)
        axes.plot(*zip(*line, strict=True), "-" if number < 10 else "--", color=color, label=method)
        seeds = [
            (row["flops_left"], row["accuracy"])
            for row in rows
            if row["method"] == method
            and bool(row["finetuned"]) == finetuned
            and isinstance(row.get("accuracy"), float)
        ]
        axes.plot(*zip(*seeds, strict=True), ".", color=color, alpha=0.6)
    axes.set_xscale("log")
    axes.set_xlabel("FLOPs left")
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
