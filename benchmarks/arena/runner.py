"""Many runs side by side: a small search of every method's strength, then the other seeds, then the test images once.

What is there already is not done again, so the command can be stopped and given again at any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .methods import ALL
from .training import Settings

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Arena:
    """What is compared with what, and on which machine's cores."""

    methods: Sequence[str]
    budgets: Sequence[float]
    seeds: Sequence[int]
    base: Settings  # of every run: data, model, recipe
    out: Path
    tries: int = 3
    jobs: int = 1
    threads: int = 1

    def settings(self, method: str, strength: float, seed: int) -> Settings:
        return replace(self.base, method=method, strength=strength, seed=seed)

    def folder(self, settings: Settings) -> Path:
        return self.out / settings.key

    def strengths(self, method: str) -> list[float]:
        """Those that are tried, without repetitions: `none` has nothing to search."""
        return list(dict.fromkeys(ALL[method].strengths[: self.tries]))

    def run(self) -> None:
        """All of it; what is done already is skipped."""
        first = self.seeds[0]
        search = [self.settings(m, strength, first) for m in self.methods for strength in self.strengths(m)]
        self.work([(settings, False) for settings in search], "search")
        self.work(
            [(self.settings(m, self.best(m), seed), True) for seed in self.seeds for m in self.methods],
            "seeds",
        )

    def best(self, method: str) -> float:
        """The strength whose smaller networks are right most often on the validation images, over all budgets.

        A budget that cannot be reached counts as nothing right.
        """

        def score(strength: float) -> float:
            rows = read(self.folder(self.settings(method, strength, self.seeds[0])) / "validation.json")
            return sum(row.get("accuracy", 0.0) for row in rows if row["cut"] in self.budgets) / len(
                self.budgets
            )

        return max(self.strengths(method), key=score)

    def work(self, wanted: list[tuple[Settings, bool]], what: str) -> None:
        """Run what is not there yet, as many at once as there are jobs."""
        todo = [(s, test) for s, test in wanted if not self.folder(s).joinpath(_result(test)).exists()]
        begin, finished, running = time.monotonic(), 0, []
        while todo or running:
            while todo and len(running) < self.jobs:
                settings, test = todo.pop(0)
                running.append((settings, self.start(settings, test)))
            time.sleep(1)
            for item in list(running):
                settings, process = item
                if process.poll() is None:
                    continue
                running.remove(item)
                finished += 1
                if process.returncode:
                    print(
                        f"{what}: {settings.key} failed, see {self.folder(settings) / 'log.txt'}", flush=True
                    )
                    continue
                left = (time.monotonic() - begin) / finished * (len(todo) + len(running))
                print(f"{what}: {settings.key} done, some {left / 60:.0f} min left of this part", flush=True)

    def start(self, settings: Settings, test: bool) -> subprocess.Popen[bytes]:
        folder = self.folder(settings)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.arena.worker", json.dumps(asdict(settings)), str(folder)]
        command += [json.dumps(list(self.budgets)), *(["--test"] if test else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def rows(self) -> list[dict[str, Any]]:
        """One row for each smaller network of each finished run, on the test images."""
        rows = []
        for method in self.methods:
            if not all(
                self.folder(self.settings(method, s, self.seeds[0])).joinpath("validation.json").exists()
                for s in self.strengths(method)
            ):
                continue
            strength = self.best(method)
            for seed in self.seeds:
                settings = self.settings(method, strength, seed)
                about = {
                    "data": settings.data,
                    "model": settings.model,
                    "method": method,
                    "kind": ALL[method].kind,
                }
                about |= {"strength": strength, "seed": seed, "epochs": settings.epochs}
                rows += [{**about, **row} for row in read(self.folder(settings) / "test.json")]
        return rows


def _result(test: bool) -> str:
    return "test.json" if test else "validation.json"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a run; none where it is not finished."""
    return json.loads(path.read_text()) if path.exists() else []
