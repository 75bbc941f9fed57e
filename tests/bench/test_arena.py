"""The arena: runs that may stop after any epoch, a search that reads no test image, a table that says who wins."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.__main__ import main
from benchmarks.arena import report, worker
from benchmarks.arena.cuts import rows_of
from benchmarks.arena.methods import ABLATION, METHODS
from benchmarks.arena.runner import Arena
from benchmarks.arena.training import Run, Settings, Split

TINY = Settings("ffr", 1.0, 0, model="resnet8", epochs=2, finetune_epochs=1, train_images=200)


@pytest.fixture(scope="module")
def split() -> Split:
    return Split.of(TINY)


def test_no_validation_image_is_trained_on(split: Split) -> None:
    assert len(split.train[0]) == 160
    assert len(split.validation[0]) == 40
    seen = {image.numpy().tobytes() for image in split.train[0]}
    assert not any(image.numpy().tobytes() in seen for image in split.validation[0])


@pytest.mark.parametrize("name", [name for name in {**METHODS, **ABLATION} if name != "torch-pruning"])
def test_every_method_trains_and_its_networks_are_cut_and_judged(name: str, split: Split) -> None:
    method = {**METHODS, **ABLATION}[name]
    run = Run(replace(TINY, method=name, strength=method.strengths[0]), split)
    assert math.isfinite(run.epoch())
    rows = rows_of(run, [0.5], on_test=False, finetune=False)
    assert [row["cut"] for row in rows] == ["died", 0.5]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["flops_left"] <= (1 if row["cut"] == "died" else 0.5)
        assert row["max_error"] < 1e-3, "cuts are exact"


@pytest.mark.parametrize("name", ["ffr+slimming", "stressed-nets"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(name: str, split: Split, tmp_path: Path) -> None:
    settings = replace(TINY, method=name, epochs=4)
    whole = Run(settings, split)
    whole.train(tmp_path / "whole")
    first = Run(settings, split)
    first.epoch()
    first.epoch()
    first.save(tmp_path / "stopped")
    second = Run(settings, split)
    assert second.resume(tmp_path / "stopped")
    second.train(tmp_path / "stopped")
    for a, b in zip(whole.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="other settings"):
        Run(replace(settings, lr=0.2), split).resume(tmp_path / "stopped")


def test_the_strength_is_chosen_without_the_test_images(tmp_path: Path) -> None:
    arena = Arena(["ffr"], [0.5], [0], TINY, tmp_path)
    for strength, accuracy in zip(arena.strengths("ffr"), (0.4, 0.9, 0.6), strict=True):
        folder = arena.folder(arena.settings("ffr", strength, 0))
        folder.mkdir(parents=True)
        rows = [{"cut": "died", "accuracy": 1 - accuracy}, {"cut": 0.5, "accuracy": accuracy}]
        (folder / "validation.json").write_text(json.dumps(rows))
    assert arena.best("ffr") == arena.strengths("ffr")[1]


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(["none"], [0.5], [0], replace(TINY, epochs=1), tmp_path)
    started = []

    class Done:
        returncode = 0

        def poll(self) -> int:
            return 0

    def start(self: Arena, settings: Settings, test: bool) -> Any:
        started.append(test)
        folder = self.folder(settings)
        folder.mkdir(parents=True, exist_ok=True)
        row = [{"cut": 0.5, "accuracy": 0.5}]
        (folder / ("test.json" if test else "validation.json")).write_text(json.dumps(row))
        return Done()

    monkeypatch.setattr(Arena, "start", start)
    monkeypatch.setattr("benchmarks.arena.runner.time.sleep", lambda seconds: None)
    arena.run()
    arena.run()
    assert started == [False, True]


def test_the_worker_leaves_rows_and_the_command_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = replace(TINY, method="none", strength=0.0, epochs=1)
    arena = Arena(["none"], [0.5], [0], settings, tmp_path)
    worker.main([json.dumps(settings.__dict__), str(arena.folder(settings)), "[0.5]", "--test"])
    tiny = ["--model", "resnet8", "--epochs", "1", "--finetune-epochs", "1", "--train-images", "200"]
    options = ["--methods", "none", "--budgets", "0.5", "--seeds", "0", *tiny]
    assert main(["arena", *options, "--out", str(tmp_path), "--report-only"]) == 0
    assert "| none |" in capsys.readouterr().out.replace("**", "")
    rows = report.read_csv(tmp_path / "digits-resnet8.csv")
    assert [(row["cut"], row["finetuned"]) for row in rows] == [("died", 0), ("died", 1), (0.5, 0), (0.5, 1)]
    assert all(row["training_seconds"] > 0 for row in rows)


def test_the_front_holds_whom_nobody_beats() -> None:
    def entry(method: str, accuracy: float, flops: float) -> dict[str, Any]:
        return {"method": method, "accuracy": accuracy, "flops_left": flops, "seeds": 1}

    entries = [entry("a", 0.9, 0.5), entry("b", 0.8, 0.2), entry("c", 0.8, 0.5), entry("d", 0.95, 0.9)]
    assert report.front(entries) == {"a", "b", "d"}
