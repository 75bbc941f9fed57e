"""Many runs side by side: a small search of every method's strength, then the other seeds, then the test images once.

What is there already is not done again, so the command can be stopped and given again at any time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.common.models import build

from .ablation import ALL
from .cost import latencies
from .training import Settings, Split
from .worker import FINAL, SEARCH

ROOT = Path(__file__).resolve().parents[2]
BATCHES = (1, 128)  # images, of the latencies


@dataclass(frozen=True)
class Arena:
    """What is compared with what, and on which machine's cores."""

    methods: Sequence[str]
    budgets: Sequence[float]
    seeds: Sequence[int]
    base: Settings  # of every run: data, model, recipe
    out: Path
    tries: int = 4
    jobs: int = 1
    threads: int = 1
    # To try instead of a method's own.
    own_strengths: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a search that is not the same for all."""
        tries = {m: len(self.strengths(m)) for m in self.methods if len(ALL[m].strengths) > 1}
        if len(set(tries.values())) > 1:
            raise ValueError(f"every method needs the same number of strengths to try, got {tries}")

    @property
    def searched(self) -> list[str]:
        """The methods all of whose strengths have been tried."""
        first = self.seeds[0]
        return [
            m
            for m in self.applicable
            if all((self.folder(self.settings(m, s, first)) / SEARCH).exists() for s in self.strengths(m))
        ]

    def settings(self, method: str, strength: float, seed: int) -> Settings:
        return replace(self.base, method=method, strength=strength, seed=seed)

    def folder(self, settings: Settings) -> Path:
        return self.out / settings.key

    def strengths(self, method: str) -> list[float]:
        """Those that are tried: of more than there are tries the middle ones. `none` has nothing to search."""
        known = self.own_strengths.get(method, ALL[method].strengths)
        first = max(0, len(known) - self.tries) // 2
        return list(known[first : first + self.tries])

    def run(self) -> None:
        """All of it; what is done already is skipped."""
        for method, why in self.refused.items():
            print(f"{method} does not apply to {self.base.model}: {why}", flush=True)
        first, methods = self.seeds[0], self.applicable
        search = [self.settings(m, strength, first) for m in methods for strength in self.strengths(m)]
        self.work([(settings, False) for settings in search], "search")
        self.work(
            [(self.settings(m, self.best(m), seed), True) for seed in self.seeds for m in methods], "seeds"
        )

    @cached_property
    def refused(self) -> dict[str, str]:
        """The methods that have nothing to do with this network, and why."""
        images = Split.of(self.base).images
        model = build(self.base.model, images.classes, images.channels)
        why = {method: ALL[method].refusal(model, images.train_x[:2]) for method in self.methods}
        return {method: text for method, text in why.items() if text}

    @property
    def applicable(self) -> list[str]:
        return [method for method in self.methods if method not in self.refused]

    def best(self, method: str) -> float:
        """The strength whose smaller networks are right most often on the validation images, over all budgets.

        A budget that cannot be reached counts as nothing right; of equals, what died by itself decides.
        """

        def score(strength: float) -> tuple[float, float]:
            rows = read(self.folder(self.settings(method, strength, self.seeds[0])) / SEARCH)
            right = sum(row["accuracy"] for row in rows if row["cut"] in self.budgets) / len(self.budgets)
            return right, -next((row["flops_left"] for row in rows if row["cut"] == "died"), 1.0)

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
        command = self._command(settings, "--test" if test else "")
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdout=log, stderr=subprocess.STDOUT
            )

    def _command(self, settings: Settings, option: str) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.arena.worker", json.dumps(asdict(settings))]
        command += [str(self.folder(settings)), json.dumps(list(self.budgets))]
        return [*command, option] if option else command

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads)}

    def finished(self) -> list[Settings]:
        """The runs that the test images have judged: the best strength of each method that is searched, each seed."""
        chosen = [self.settings(m, self.best(m), seed) for m in self.searched for seed in self.seeds]
        return [settings for settings in chosen if (self.folder(settings) / FINAL).exists()]

    def measure(self) -> None:
        """Latencies of all smaller networks, in turns, and what a step of each method costs, one after the other."""
        finished = self.finished()
        for settings in {s.method: s for s in reversed(finished)}.values():
            command = self._command(settings, "--cost")
            print(f"cost: {settings.method}", flush=True)
            out = subprocess.run(command, cwd=ROOT, env=self._environment(), capture_output=True, check=True)
            self._cost_file(settings).write_bytes(out.stdout.splitlines()[-1])
        self._latencies(finished)

    def _cost_file(self, settings: Settings) -> Path:
        return self.folder(settings).parent / f"cost-{settings.method}.json"

    def _latencies(self, finished: Sequence[Settings]) -> None:
        torch.set_num_threads(self.threads)
        images = Split.of(self.base).images
        models: dict[Any, nn.Module] = {}
        for settings in finished:
            for cut in torch.load(self.folder(settings) / "cuts.pt", weights_only=False):  # our own file
                if cut.model is not None:
                    models[self.folder(settings), str(cut.cut)] = cut.model
        models[None] = build(self.base.model, images.classes, images.channels)
        for batch in BATCHES:
            print(f"latency: {len(models)} networks, batch {batch}", flush=True)
            taken = latencies(models, images.test_x[:batch])
            whole = taken.pop(None)
            for folder in {folder for folder, _ in taken}:
                of = {cut: [t, t / whole] for (where, cut), t in taken.items() if where == folder}
                (folder / f"latency-{batch}.json").write_text(json.dumps(of))

    def rows(self) -> list[dict[str, Any]]:
        """One row for each smaller network of each finished run, on the test images."""
        rows = []
        for settings in self.finished():
            about = {
                name: getattr(settings, name) for name in ("data", "model", "method", "strength", "seed")
            }
            about |= {"kind": ALL[settings.method].kind, "epochs": settings.epochs}
            about |= {"train_images": settings.train_images or "all"}
            about |= _json(self._cost_file(settings))
            latency = {batch: _json(self.folder(settings) / f"latency-{batch}.json") for batch in BATCHES}
            for row in read(self.folder(settings) / FINAL):
                measured = {}
                for batch, of in latency.items():
                    if str(row["cut"]) in of:
                        seconds, share = of[str(row["cut"])]
                        measured |= {f"latency_ms_{batch}": 1e3 * seconds, f"latency_left_{batch}": share}
                rows.append({**about, **row, **measured})
        return rows + self.rows_of_refused()

    def rows_of_refused(self) -> list[dict[str, Any]]:
        base = {"data": self.base.data, "model": self.base.model, "epochs": self.base.epochs}
        return [{**base, "method": m, "kind": ALL[m].kind, "note": why} for m, why in self.refused.items()]

    def search_rows(self) -> list[dict[str, Any]]:
        """One row for each cut of each strength that was tried, on the validation images."""
        rows = []
        for method in self.searched:
            best = self.best(method)
            for strength in self.strengths(method):
                settings = self.settings(method, strength, self.seeds[0])
                about = {"method": method, "strength": strength, "seed": settings.seed}
                about["chosen"] = int(strength == best)
                rows += [{**about, **row} for row in read(self.folder(settings) / SEARCH)]
        return rows


def _result(test: bool) -> str:
    return FINAL if test else SEARCH


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a run; none where it is not finished."""
    return json.loads(path.read_text()) if path.exists() else []


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
