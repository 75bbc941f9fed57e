"""One run in a process of its own: `python -m benchmarks.arena.worker SETTINGS FOLDER BUDGETS [--test | --cost]`.

SETTINGS and BUDGETS are JSON. Leaves `search.json` in the folder: the cuts by the validation images; with `--test` also
`final.json`: by the test images, and fine-tuned. The checkpoint stays, so that cuts can be made again without
training. `--cost` trains nothing and prints what a step costs as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from .cost import cost_of
from .cuts import Cut, cuts_of, test_rows, validation_rows
from .training import Run, Settings, Split

SEARCH, FINAL = "search.json", "final.json"


def main(arguments: list[str]) -> None:
    settings, folder = Settings(**json.loads(arguments[0])), Path(arguments[1])
    split = Split.of(settings)
    if "--cost" in arguments:
        print(json.dumps(cost_of(settings, split)))
        return
    run = Run(settings, split)
    run.resume(folder)
    run.train(folder, lambda run, loss: print(f"{run.finished} {loss:.4f}", flush=True))
    cuts = _cuts(run, folder, json.loads(arguments[2]))
    about = {"training_seconds": run.seconds}
    write(folder / SEARCH, validation_rows(run, cuts), about)
    if "--test" in arguments:
        write(folder / FINAL, test_rows(run, cuts), about)


def _cuts(run: Run, folder: Path, budgets: list[float]) -> list[Cut]:
    """Made once, for the search; the very same are judged by the test images."""
    path = folder / "cuts.pt"
    if path.exists():
        kept: list[Cut] = torch.load(path, weights_only=False)  # our own file
        if [cut.cut for cut in kept] == ["died", *budgets]:
            return kept
    cuts = cuts_of(run, budgets)
    torch.save(cuts, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)
    return cuts


def write(path: Path, rows: list[dict[str, Any]], about: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps([{**about, **row} for row in rows], indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main(sys.argv[1:])
