"""`python -m ffr_ext sparsity` and `compact`, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_pruning_compact import Residual, dead, difference

from ffr_ext import CompactionPlan
from ffr_ext.__main__ import main

MODEL = "test_pruning_compact:Residual"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.save({"model": dead().state_dict(), "epoch": 3}, path)
    return path


def test_sparsity(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sparsity", MODEL, str(checkpoint), "--key", "model", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["zero_filters"] == 10
    assert main(["sparsity", MODEL, str(checkpoint), "--key", "model", "--input", "1,3,8,8"]) == 0
    assert "FLOPs" in capsys.readouterr().out


def test_compact_writes_a_checkpoint_and_its_plan(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = checkpoint.with_name("small.pt")
    arguments = ["--key", "model", "--input", "2,3,8,8", "-o", str(output), "--explain"]
    assert main(["compact", MODEL, str(checkpoint), *arguments]) == 0
    text = capsys.readouterr().out
    assert "of the parameters are gone" in text
    assert "5 of 12 channels removed" in text
    small = CompactionPlan.load(output.with_suffix(".json")).apply(Residual())
    small.load_state_dict(torch.load(output, weights_only=True))
    full = Residual()
    full.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    assert difference(small.eval(), full.eval()) < 1e-6


def test_threshold_zeroes_first(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = checkpoint.with_name("small.pt")
    arguments = [
        "--key",
        "model",
        "--input",
        "2,3,8,8",
        "-o",
        str(output),
        "--threshold",
        "0.8",
        "--not-strict",
    ]
    assert main(["compact", MODEL, str(checkpoint), *arguments]) == 0
    assert "zeroed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.such.module:f"], "No module named"),
        (["test_pruning_compact"], "expected package.module:function"),
        ([MODEL, "missing.pt"], "missing.pt"),
        ([MODEL, "--input", "1,x"], "expected a shape"),
        (["builtins:dict"], "expected an nn.Module"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sparsity", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
