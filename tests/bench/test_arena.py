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
from benchmarks.arena.ablation import ABLATION
from benchmarks.arena.cuts import cuts_of, validation_rows, without_empty_blocks
from benchmarks.arena.main import parser
from benchmarks.arena.methods import METHODS
from benchmarks.arena.runner import ROOT, Arena
from benchmarks.arena.training import Run, Settings, Split
from examples.common.data import Images
from examples.common.models import ResidualBlock, build

TINY = Settings("ffr", 1.0, 0, model="resnet8", epochs=2, finetune_epochs=1, train_images=200)


@pytest.fixture(scope="module")
def split() -> Split:
    return Split.of(TINY)


def test_no_validation_image_is_trained_on(split: Split) -> None:
    assert len(split.train[0]) == 160
    assert len(split.validation[0]) == 40
    seen = {image.numpy().tobytes() for image in split.train[0]}
    assert not any(image.numpy().tobytes() in seen for image in split.validation[0])


@pytest.mark.filterwarnings("ignore:ffr_loss is 0")  # stages of a ResNet-8 are too short for a curvature
@pytest.mark.parametrize("name", [name for name in ABLATION if name not in METHODS])
def test_every_variant_of_ffr_trains(name: str, split: Split) -> None:
    settings = replace(TINY, method=name, strength=ABLATION[name].strengths[0])
    assert math.isfinite(Run(settings, split).epoch())


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_trains_and_its_networks_are_cut_and_judged(name: str, split: Split) -> None:
    if name == "torch-pruning":
        pytest.importorskip("torch_pruning")
    run = Run(replace(TINY, method=name, strength=METHODS[name].strengths[0]), split)
    assert math.isfinite(run.epoch())
    rows = validation_rows(run, cuts_of(run, [0.5]))
    assert [row["cut"] for row in rows] == ["died", 0.5]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1
        assert 0 < row["flops_left"] <= (1 if row["cut"] == "died" else 0.5)
        assert row["max_error"] < 1e-3, "cuts are exact"


def test_a_strong_cut_is_within_reach_and_what_died_counts_where_it_is_small_enough(split: Split) -> None:
    run = Run(replace(TINY, method="none", strength=0.0), split)
    with torch.no_grad():
        for name, module in run.model.named_modules():
            if name.endswith("norm2"):
                module.weight.zero_()
    died, small = cuts_of(run, [0.12])
    assert died.flops_left < 0.12, "all blocks but the strided shortcuts are gone"
    assert small.flops_left <= 0.12
    assert small.how.startswith("died")
    assert len(cuts_of(Run(replace(TINY, method="none"), split), [0.06])) == 2


def test_a_block_whose_branch_is_constant_leaves_exactly(split: Split) -> None:
    model = build("resnet8", 10, 1).eval()
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.bias.uniform_(-1, 1)
        blocks[0].norm2.weight.zero_()
        blocks[1].norm1.weight.zero_()
    images = split.validation[0][:8]
    smaller, error = without_empty_blocks(model, images)
    assert error < 1e-5
    assert torch.allclose(smaller(images), model(images), atol=1e-5)
    assert sum(isinstance(module, ResidualBlock) for module in smaller.modules()) == len(blocks) - 2


def test_a_method_without_anything_to_do_is_reported_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.arena.runner.Split.of", lambda settings: _pretend_mnist())
    arena = Arena(["none", "slimming"], [0.5], [0], replace(TINY, model="lenet5"), tmp_path)
    assert arena.applicable == ["none"]
    (row,) = arena.rows_of_refused()
    assert row["method"] == "slimming"
    assert "norm" in row["note"]
    assert "| slimming | does not apply |" in report.died_table([row])


def _pretend_mnist() -> Any:
    class Pretended:
        images = Images("mnist", 10, torch.randn(4, 1, 28, 28), torch.arange(4), *[torch.empty(0)] * 2, False)

    return Pretended()


@pytest.mark.parametrize("name", ["ffr+slimming", "stressed-nets", "ffr-ramp"])
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
    for strength, accuracy in zip(arena.strengths("ffr"), (0.4, 0.9, 0.6, 0.1), strict=True):
        folder = arena.folder(arena.settings("ffr", strength, 0))
        folder.mkdir(parents=True)
        rows = [
            {"cut": "died", "accuracy": 1 - accuracy, "flops_left": 0.5},
            {"cut": 0.5, "accuracy": accuracy},
        ]
        (folder / "search.json").write_text(json.dumps(rows))
    assert arena.best("ffr") == arena.strengths("ffr")[1]


def test_with_fewer_tries_the_middle_strengths_are_taken(tmp_path: Path) -> None:
    known = list(METHODS["ffr"].strengths)
    taken = {
        tries: Arena(["ffr"], [0.5], [0], TINY, tmp_path, tries=tries).strengths("ffr") for tries in (1, 2, 4)
    }
    assert taken == {1: known[1:2], 2: known[1:3], 4: known}


def test_strengths_of_ones_own_take_the_place_of_a_methods_and_are_as_many_for_all(tmp_path: Path) -> None:
    own = {"ffr": (0.1, 0.3), "slimming": (1e-3, 1e-2)}
    arena = Arena(["none", "ffr", "slimming"], [0.5], [0], TINY, tmp_path, own_strengths=own)
    assert {m: arena.strengths(m) for m in arena.methods} == {
        "none": [0.0],
        **{m: [*s] for m, s in own.items()},
    }
    with pytest.raises(ValueError, match=r"same number of strengths.*'ffr': 2, 'slimming': 4"):
        Arena(["none", "ffr", "slimming"], [0.5], [0], TINY, tmp_path, own_strengths={"ffr": (0.1, 0.3)})


def test_the_command_reads_strengths_by_method(capsys: pytest.CaptureFixture[str]) -> None:
    read = parser().parse_args(["--strengths", "ffr=0.1,3", "ffr+slimming=1"]).strengths
    assert read == [("ffr", (0.1, 3.0)), ("ffr+slimming", (1.0,))]
    for wrong, message in (("magic=1", "unknown method 'magic'"), ("ffr", "expected ffr=A,B,C with numbers")):
        with pytest.raises(SystemExit):
            parser().parse_args(["--strengths", wrong])
        assert message in capsys.readouterr().err


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
        (folder / ("final.json" if test else "search.json")).write_text(json.dumps(row))
        return Done()

    monkeypatch.setattr(Arena, "start", start)
    monkeypatch.setattr("benchmarks.arena.runner.time.sleep", lambda seconds: None)
    arena.run()
    arena.run()
    assert started == [False, True]


def test_the_command_leaves_rows_tables_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done:
        returncode = 0

        def poll(self) -> int:
            return 0

    def start(self: Arena, settings: Settings, test: bool) -> Any:
        """As the worker's process would, without starting one."""
        worker.main(self._command(settings, "--test" if test else "")[3:])
        return Done()

    monkeypatch.setattr(Arena, "start", start)
    page = tmp_path / "page.md"
    page.write_text("<!-- arena: digits-resnet8, died -->\nold\n<!-- arena: end -->\n")
    tiny = ["--model", "resnet8", "--epochs", "1", "--finetune-epochs", "1", "--train-images", "200"]
    options = ["--methods", "none", "--budgets", "0.5", "--seeds", "0", *tiny, "--pages", str(page)]
    assert main(["arena", *options, "--out", str(tmp_path)]) == 0
    assert "| none |" in capsys.readouterr().out.replace("**", "")
    rows = report.read_csv(tmp_path / "digits-resnet8.csv")
    assert [(row["cut"], row["finetuned"]) for row in rows] == [("died", 0), ("died", 1), (0.5, 0), (0.5, 1)]
    for row in rows:
        assert row["training_seconds"] > 0
        assert row["latency_ms_1"] > 0
        assert row["peak_memory_mib"] > 0
        assert json.loads(row["filters"])["head"] == 10
    assert report.died_table(rows) in page.read_text()
    assert len(list(tmp_path.glob("*.png"))) == 4


@pytest.mark.parametrize("page", ["docs/arena.md", "README.md"])
def test_the_tables_of_a_page_are_those_of_its_csv(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- arena: digits-resnet20, " in text
    assert report.fill(text, ROOT / "docs/results/arena") == text


def test_the_front_holds_whom_nobody_beats() -> None:
    def entry(method: str, accuracy: float, flops: float) -> dict[str, Any]:
        return {"method": method, "accuracy": accuracy, "flops_left": flops, "seeds": 1}

    entries = [entry("a", 0.9, 0.5), entry("b", 0.8, 0.2), entry("c", 0.8, 0.5), entry("d", 0.95, 0.9)]
    assert report.front(entries) == {"a", "b", "d"}
