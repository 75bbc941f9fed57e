"""One run in a process of its own: `python -m benchmarks.arena.worker SETTINGS FOLDER BUDGETS [--test]`.

SETTINGS and BUDGETS are JSON. Leaves `validation.json` in the folder, and `test.json` where the test images may be
read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .cuts import rows_of
from .training import Run, Settings, Split, peak_memory


def main(arguments: list[str]) -> None:
    settings, folder = Settings(**json.loads(arguments[0])), Path(arguments[1])
    budgets, on_test = json.loads(arguments[2]), "--test" in arguments
    run = Run(settings, Split.of(settings))
    run.resume(folder)
    run.train(folder, lambda run, loss: print(f"{run.finished} {loss:.4f}", flush=True))
    about = {
        "training_seconds": run.seconds,
        "peak_memory_mib": peak_memory(),
        "added_time": run.added_time(),
    }
    # Strengths are chosen by what the cut itself leaves: fine-tuning every try would cost a quarter of its training.
    write(folder / "validation.json", rows_of(run, budgets, on_test=False, finetune=False), about)
    if on_test:
        write(folder / "test.json", rows_of(run, budgets, on_test=True), about)


def write(path: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps([{**about, **row} for row in rows], indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:])
