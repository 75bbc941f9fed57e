"""A benchmark in several fresh processes, one after another, and their rows made into one.

How a process's heap happens to lie decides whether large tensors are handed out from memory that is there or cost a
page fault for every 4 KB, call after call: one provider's time can be twice as long in one process as in the next,
with narrow percentiles in both. So every number is the median over processes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .harness.measure import Row
from .reporting.results import print_table

MEDIAN = ("ms", "ms_p20", "ms_p80", "host_ms", "gbps", "copy_percent", "peak_bytes", "allocated_bytes")
WORST = ("error",)


def save(rows: Sequence[Row], path: Path) -> None:
    """The rows of this process for the one that started it."""
    path.write_text(json.dumps([asdict(row) for row in rows]))


def measured_in_processes(arguments: Sequence[str], processes: int) -> list[Row]:
    """`python -m benchmarks ARGUMENTS` in as many processes, which print their rows as they go."""
    runs = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(processes):
            print(f"# process {number + 1} of {processes}", flush=True)
            path = Path(directory) / f"{number}.json"
            subprocess.run(
                [sys.executable, "-m", "benchmarks", *arguments, "--no-write", "--rows", str(path)],
                check=True,
            )
            runs.append([Row(**row) for row in json.loads(path.read_text())])
    rows = merged(runs)
    print(f"# medians over {processes} processes")
    print_table(rows)
    return rows


def merged(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """One row for each of the first run's: medians over the runs, also of what the configuration measures, the worst
    error, the samples added up, and in the configuration how many processes there were and the medians of each."""
    by_key: dict[tuple[str, str, str], list[Row]] = {}
    for run in runs:
        for row in run:
            by_key.setdefault((row.case, row.mode, row.provider), []).append(row)
    rows = []
    for same in by_key.values():
        values = {name: [getattr(row, name) for row in same] for name in (*MEDIAN, *WORST)}
        known = {name: [v for v in each if v is not None] for name, each in values.items()}
        change = {name: statistics.median(known[name]) if known[name] else None for name in MEDIAN}
        change |= {name: max(known[name]) if known[name] else None for name in WORST}
        config = {
            **same[0].config,
            **_medians([row.config for row in same]),
            "processes": len(same),
            "ms_of_processes": [float(f"{row.ms:.4g}") for row in same],
        }
        rows.append(replace(same[0], samples=sum(row.samples for row in same), config=config, **change))
    return rows


def _medians(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of the entries that are measured (settings are no floats), and those of each process."""
    names = [name for name, value in configs[0].items() if isinstance(value, float)]
    measured = {name: [config[name] for config in configs] for name in names}
    medians = {name: statistics.median(values) for name, values in measured.items()}
    return medians | {
        f"{name}_of_processes": [float(f"{v:.4g}") for v in values] for name, values in measured.items()
    }
