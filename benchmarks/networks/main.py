"""Runs the networks, keeps the rows of others, and draws the table of docs/compaction.md."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import statistics
from pathlib import Path

import torch

from .protocol import Outcome, run
from .zoo import FAMILIES, NETWORKS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results" / "networks" / "networks.csv"
COLUMNS = [field.name for field in dataclasses.fields(Outcome)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks networks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="timm/resnet18, or timm for all of a library"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV whose rows are replaced")
    parser.add_argument("--table", action="store_true", help="print the table by family, and run nothing")
    options = parser.parse_args(arguments)
    if options.table:
        print(table(read(options.out)))
        return 0
    chosen = [name for name in NETWORKS if not options.names or _is_meant(name, options.names)]
    unknown = [n for n in options.names if not any(_is_meant(name, [n]) for name in NETWORKS)]
    if unknown:
        parser.error(f"NAME: expected some of {', '.join(NETWORKS)}, or a library, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    torch.export.export(torch.nn.Linear(1, 1), (torch.randn(1, 1),))  # the first one loads what all need
    for name in chosen:
        try:
            outcome = run(NETWORKS[name])
        except ImportError as error:
            print(f"{name}: not measured, {error}", flush=True)
            continue
        print(line(outcome), flush=True)
        rows = {row["network"]: row for row in read(options.out)} | {name: _as_row(outcome)}
        write(options.out, [rows[n] for n in NETWORKS if n in rows])
    return 0


def _is_meant(name: str, names: list[str]) -> bool:
    return any(name == n or name.startswith(f"{n}/") for n in names)


def line(outcome: Outcome) -> str:
    """What came out, as text."""
    if outcome.refused:
        return f"{outcome.network}: refused: {outcome.refused}"
    left = [outcome.without, outcome.merged, outcome.nothing_to_merge]
    shares = ", ".join(f"{(n or 0) / outcome.parameters:.1%}" for n in left)
    return (
        f"{outcome.network}: {outcome.parameters:,} parameters, left {shares}; error {outcome.relative_error:.1e}; "
        f"{outcome.compact_seconds:.1f} s, {outcome.exports} exports of {outcome.export_seconds:.1f} s; "
        f"unknown: {outcome.unknown_ops or 'none'}; stays: {outcome.stays}"
    )


def _as_row(outcome: Outcome) -> dict[str, str]:
    row = {name: getattr(outcome, name) for name in COLUMNS}
    numbers = {name: f"{value:.3g}" for name, value in row.items() if isinstance(value, float)}
    return {name: "" if value is None else str(value) for name, value in (row | numbers).items()}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, str]]) -> str:
    """One line for each family: median, lowest and highest share of the parameters left, and the largest cost."""
    lines = [
        "| family | networks | without | merged | nothing to merge | at most |",
        "|---|---:|---|---|---|---:|",
    ]
    for family in FAMILIES:
        members = [r for r in rows if r["family"] == family and not r["refused"]]
        if not members:
            continue
        shares = [_range(members, column) for column in ("without", "merged", "nothing_to_merge")]
        cost = max(float(r["compact_seconds"]) / float(r["export_seconds"]) for r in members)
        lines.append(f"| {family} | {len(members)} | {' | '.join(shares)} | {cost:.1f} exports |")
    return "\n".join(lines)


def _range(rows: list[dict[str, str]], column: str) -> str:
    shares = [100 * int(row[column]) / int(row["parameters"]) for row in rows]
    return f"{statistics.median(shares):.0f} % ({min(shares):.0f} .. {max(shares):.0f})"
