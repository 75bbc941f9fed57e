"""Rows on disk: one JSON file per benchmark and machine, a header that says where they come from, one row a
line.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..harness.measure import Row, as_dict

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def header(device: torch.device | str) -> dict[str, Any]:
    """Machine, device, driver, versions, commit: what a number means nothing without."""
    device = torch.device(device)
    return {
        "machine": machine(device),
        "device": device.type,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": driver() if device.type == "cuda" else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "ffr_ext": _version("ffr-ext"),
        "native": _native(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def commit() -> str:
    """The commit of the sources, with `-dirty` if what is measured differs from it; `unknown` outside a
    repository.
    """
    measured = ["ffr_ext", "csrc", "benchmarks/*.py", "CMakeLists.txt", "setup.py"]
    try:
        name = _git("rev-parse", "--short=10", "HEAD")
        return name + ("-dirty" if _git("status", "--porcelain", "--", *measured) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def processor() -> str:
    """The processor's model name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def machine(device: torch.device) -> str:
    """A short name for the files: the GPU, or the processor with the cores that this process may use."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"{processor()} {cores} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def driver() -> str | None:
    """The version of the GPU's driver, or None where nvidia-smi does not say."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _native() -> str | None:
    from ffr_ext import backends

    module = backends.native()
    return None if module is None else str(module.build_info()["cpu_isa"])


def write(bench: str, rows: Sequence[Row], device: torch.device | str, directory: Path | None = None) -> Path:
    """Write the rows of one benchmark on this machine; earlier ones are replaced. Default directory:
    $FFR_RESULTS_DIR, or that of the committed results."""
    head = header(device)
    directory = directory or Path(os.environ.get("FFR_RESULTS_DIR") or RESULTS)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{bench}-{head['machine']}.json"
    lines = ",\n    ".join(json.dumps(_rounded(as_dict(row))) for row in rows)
    path.write_text(f'{{\n  "header": {json.dumps(head)},\n  "rows": [\n    {lines}\n  ]\n}}\n')
    return path


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}


def read(directory: Path = RESULTS) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(header, rows) of every committed file, in the order of their names."""
    return [
        (content["header"], content["rows"])
        for content in (json.loads(path.read_text()) for path in sorted(directory.glob("*.json")))
    ]


def print_header(device: torch.device | str) -> None:
    """The header as text, above a table."""
    for key, value in header(device).items():
        if value is not None:
            print(f"# {key}: {value}")
    sys.stdout.flush()


def print_table(rows: Sequence[Row]) -> None:
    """One line per row, as it is measured."""
    for row in rows:
        parts = [f"{row.case:26s} {row.mode:10s} {row.provider:11s} {row.ms:10.4f} ms"]
        parts.append(f"[{row.ms_p20:.4f}, {row.ms_p80:.4f}]")
        if row.gbps:
            parts.append(f"{row.gbps:7.1f} GB/s")
        if row.copy_percent is not None:
            parts.append(f"{row.copy_percent:4.0f} % of a copy")
        if row.peak_bytes is not None:
            parts.append(f"peak {row.peak_bytes / 1e6:.2f} MB")
        if row.error is not None:
            parts.append(f"error {row.error:.1e}")
        if "added_time_percent" in row.config:
            parts.append(f"added {row.config['added_time_percent']:+.1f} % time")
        if "added_peak_percent" in row.config:
            parts.append(f"added {row.config['added_peak_percent']:+.1f} % peak memory")
        print(" ".join(parts))
    sys.stdout.flush()
