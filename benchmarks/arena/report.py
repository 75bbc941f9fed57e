"""The CSVs of an arena, and the tables that follow from them."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

COLUMNS = [
    *(
        "data",
        "model",
        "method",
        "kind",
        "strength",
        "seed",
        "epochs",
        "train_images",
        "cut",
        "how",
        "finetuned",
    ),
    *("accuracy_whole", "accuracy", "flops_left", "parameters_left", "blocks_removed", "layers_removed"),
    *("latency_left_1", "latency_left_128", "latency_ms_1", "latency_ms_128", "max_error", "filters"),
    *("training_seconds", "added_time", "peak_memory_mib", "commit", "torch", "processor", "note"),
]
SEARCH_COLUMNS = [
    *("method", "strength", "seed", "chosen", "cut", "how", "accuracy_whole", "accuracy", "flops_left"),
    *("parameters_left", "blocks_removed"),
]
AVERAGED = (
    *("accuracy", "flops_left", "parameters_left", "blocks_removed", "latency_left_1", "latency_left_128"),
    *("added_time", "peak_memory_mib"),
)
DIED = {
    "accuracy, %": ("accuracy", 100, ".1f"),
    "FLOPs left, %": ("flops_left", 100, ".1f"),
    "parameters left, %": ("parameters_left", 100, ".1f"),
    "blocks gone": ("blocks_removed", 1, ".1f"),
    "time of 1 image, %": ("latency_left_1", 100, ".0f"),
    "time of 128, %": ("latency_left_128", 100, ".0f"),
    "added time a step, %": ("added_time", 100, "+.0f"),
}
ONCE = {"added_time"}  # measured once a method: no spread over seeds
Rows = Sequence[dict[str, Any]]


def write_csv(rows: Rows, path: Path, about: dict[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """All rows, each with the commit, versions and machine that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({**about, **{k: _plain(v) for k, v in row.items()}})


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    return json.dumps(value, separators=(",", ":")) if isinstance(value, dict) else value


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
        if not row.get("note"):
            groups[row["method"], row["cut"], row["finetuned"]].append(row)
    result = []
    for (method, cut, finetuned), members in groups.items():
        done = [row for row in members if isinstance(row.get("accuracy"), float)]
        entry: dict[str, Any] = {"method": method, "cut": cut, "finetuned": finetuned, "seeds": len(done)}
        entry |= {"kind": members[0]["kind"], "strength": members[0]["strength"]}
        for name in AVERAGED:
            values = [row[name] for row in done if isinstance(row.get(name), float)]
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


def died_table(rows: Rows, finetuned: bool = False, methods: Sequence[str] | None = None) -> str:
    """Markdown, a line a method: the smallest network that lost at most a point; bold: on the Pareto front."""
    entries = [e for e in summary(rows) if e["cut"] == "died" and bool(e["finetuned"]) == finetuned]
    best = front(entries)
    lines = _head(["method", "strength", "acts on", "seeds", *DIED])
    for entry in entries:
        if methods is not None and entry["method"] not in methods:
            continue
        cells = [_name(entry["method"], best), f"{entry['strength']:g}", entry["kind"], str(entry["seeds"])]
        cells += [_cell(entry, *what) for what in DIED.values()]
        lines.append(_line(cells))
    lines += [
        _line([row["method"], "does not apply", row["kind"], "0", *["-"] * len(DIED)])
        for row in rows
        if row.get("note")
    ]
    return "\n".join(lines)


def budget_table(rows: Rows) -> str:
    """Markdown, a line a method: the accuracy at each share of the FLOPs, right after the cut and fine-tuned."""
    entries = summary(rows)
    budgets = list(dict.fromkeys(e["cut"] for e in entries if e["cut"] != "died"))
    wanted = [(cut, tuned) for cut in budgets for tuned in (False, True)]
    best = {
        which: max(e["accuracy"] for e in entries if (e["cut"], bool(e["finetuned"])) == which and e["seeds"])
        for which in wanted
        if any((e["cut"], bool(e["finetuned"])) == which and e["seeds"] for e in entries)
    }
    lines = _head(["method", *(f"{cut:.0%}{', fine-tuned' if tuned else ''}" for cut, tuned in wanted)])
    for method in dict.fromkeys(e["method"] for e in entries):
        of = {(e["cut"], bool(e["finetuned"])): e for e in entries if e["method"] == method}
        cells = []
        for which in wanted:
            entry = of.get(which)
            if entry is None or not entry["seeds"]:
                cells.append("not reached")
                continue
            text = _cell(entry, "accuracy", 100, ".1f")
            cells.append(f"**{text}**" if entry["accuracy"] == best[which] else text)
        lines.append(_line([method, *cells]))
    return "\n".join(lines)


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|---" * len(names) + "|"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(method: str, best: set[str]) -> str:
    return f"**{method}**" if method in best else method


def _cell(entry: dict[str, Any], name: str, factor: float, form: str) -> str:
    if not entry["seeds"] or math.isnan(entry[name]):
        return "-"
    spread = (
        f" ± {factor * entry[f'{name}_spread']:{form}}" if entry["seeds"] > 1 and name not in ONCE else ""
    )
    return f"{factor * entry[name]:{form}}{spread}"


TABLES = {
    "died": lambda rows: died_table(rows),
    "died, fine-tuned": lambda rows: died_table(rows, finetuned=True),
    "budgets": budget_table,
    "short": lambda rows: died_table(
        rows,
        methods=[
            *("none", "slimming", "group-lasso", "torch-pruning"),
            *("ffr", "ffr+slimming", "ffr+group-lasso"),
        ],
    ),
}
_BLOCK = re.compile(
    r"<!-- arena: (?P<name>[\w-]+), (?P<kind>[\w ,-]+) -->\n.*?<!-- arena: end -->", re.DOTALL
)


def fill(text: str, folder: Path) -> str:
    """A page with the tables between its markers made anew from the CSVs of a folder."""

    def block(match: re.Match[str]) -> str:
        name, kind = match["name"], match["kind"]
        table = TABLES[kind](read_csv(folder / f"{name}.csv"))
        return f"<!-- arena: {name}, {kind} -->\n\n{table}\n\n<!-- arena: end -->"

    return _BLOCK.sub(block, text)
