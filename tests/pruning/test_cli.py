"""`python -m ffr_ext sparsity` and `compact`, as a user calls them."""

from __future__ import annotations

import argparse
import json
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_models import Residual, dead, difference
from torch import Tensor, nn

from ffr_ext import CompactionPlan
from ffr_ext.__main__ import main
from ffr_ext.pruning.cli import load_checkpoint

MODEL = "pruning_models:Residual"


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


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def renamed(**prefixes: str) -> dict[str, Tensor]:
    """The weights with a prefix in front of the names that begin so; "" is any name."""
    return {
        next((p for start, p in prefixes.items() if name.startswith(start)), prefixes.get("rest", ""))
        + name: tensor
        for name, tensor in dead().state_dict().items()
    }


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "model"])
def test_the_prefix_of_a_wrapper_is_taken_off_and_said(
    prefix: str, key: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = renamed(rest=prefix)
    path = save(tmp_path / "model.pt", state if key is None else {key: state})
    assert main(["sparsity", MODEL, path, "--json", *([] if key is None else ["--key", key])]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["total"]["zero_filters"] == 10
    assert f"took the prefix {prefix!r}" in err
    assert len(err.splitlines()) == 1


def test_a_prefix_of_the_models_own_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "model.pt", renamed(rest="module."))
    assert main(["sparsity", "pruning_models:wrapped", path, "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["total"]["zero_filters"] == 10
    assert err == ""


class Scaled(nn.Linear):
    """Its weight is half of what it was before version 2; it refuses a weight of no version."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        version = metadata.get("version")
        if version is None:
            raise ValueError(f"{prefix}weight: a state dict without a version")
        if version < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)  # type: ignore[no-untyped-call]


def scaled() -> nn.Module:
    """Layers of version 2, one of them the model's only one."""
    return nn.Sequential(Scaled(3, 4), nn.Sequential(Scaled(4, 2)))


class Wrapped(nn.Module):
    """What wraps a model under one of a wrapper's names, and has a version of its own."""

    _version = 1

    def __init__(self, model: nn.Module, name: str = "module") -> None:
        super().__init__()
        self.add_module(name, model)


def wrapped_twice(model: nn.Module) -> nn.Module:
    return Wrapped(Wrapped(model, "_orig_mod"))


def renamed_in_place(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    for name in list(state):
        state[f"module.{name}"] = state.pop(name)
    return state


@pytest.mark.parametrize(
    "state_of",
    [
        lambda model: model.state_dict(),
        lambda model: Wrapped(model).state_dict(),
        lambda model: wrapped_twice(model).state_dict(),
        renamed_in_place,
    ],
    ids=["plain", "wrapped", "wrapped twice", "renamed in place"],
)
@pytest.mark.parametrize("make", [scaled, lambda: Scaled(3, 4)], ids=["of modules", "one module"])
@pytest.mark.parametrize("key", [None, "model"])
def test_a_checkpoint_keeps_the_versions_of_its_modules(
    make: Any, state_of: Any, key: str | None, tmp_path: Path
) -> None:
    """Without them a module takes current weights for old ones and converts them once more."""
    saved, loaded = make(), make()
    state = state_of(saved)
    assert isinstance(state, OrderedDict)
    path = save(tmp_path / "model.pt", state if key is None else {key: state})
    load_checkpoint(loaded, path, key)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in saved.state_dict().items())


def test_an_old_version_is_converted_once(tmp_path: Path) -> None:
    saved, loaded = scaled(), scaled()
    state: Any = Wrapped(saved).state_dict()
    state._metadata["module.0"]["version"] = 1
    load_checkpoint(loaded, save(tmp_path / "model.pt", state))
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value / 2 if name == "0.weight" else value)


def test_what_a_module_says_of_weights_that_it_refuses_is_the_error(tmp_path: Path) -> None:
    path = save(tmp_path / "model.pt", dict(scaled().state_dict()))
    with pytest.raises(ValueError, match=r"0\.weight: a state dict without a version"):
        load_checkpoint(scaled(), path)


CHECKPOINTS: dict[str, Any] = {
    # what is in the file, further arguments, and what the message says
    "under a key": (
        lambda: {"model": dead().state_dict(), "epoch": 3},
        [],
        "no state dict in .*model.pt; there is a state dict under 'model': pass --key$",
    ),
    "under several": (
        lambda: {"state_dict": dead().state_dict(), "ema": dead().state_dict(), "optimizer": {"state": {}}},
        [],
        "under 'state_dict', 'ema': pass --key$",
    ),
    "another key": (
        lambda: {"model": dead().state_dict()},
        ["--key", "modle"],
        r"no state dict in .*\['modle'\]; there is a state dict under 'model': pass --key$",
    ),
    "the key of something else": (
        lambda: {"model": dead().state_dict(), "epoch": 3},
        ["--key", "epoch"],
        r"no state dict in .*\['epoch'\]; there is a state dict under 'model': pass --key$",
    ),
    "a prefix on some names only": (
        lambda: renamed(stem="module."),
        [],
        r"state_dict for Residual: Missing key\(s\).*stem.0.weight.*Unexpected key\(s\).*module.stem.0.weight",
    ),
    "a prefix on names of another model": (
        lambda: {f"module.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()},
        [],
        r"state_dict for Residual: Missing key\(s\).*Unexpected key\(s\).*module.weight.*module.bias",
    ),
    "a part of what was saved": (
        lambda: renamed(rest="net."),
        [],
        r"Missing key\(s\).*Unexpected key\(s\).*net.stem.0.weight",
    ),
    "other sizes": (
        lambda: Residual(width=16).state_dict(),
        [],
        r"size mismatch for stem.0.weight: .*\[16, 3, 3, 3\].*\[8, 3, 3, 3\]",
    ),
    "a whole model": (
        lambda: dead(),
        [],
        r"is no file of tensors: save model.state_dict\(\) alone \(.*GLOBAL pruning_models\.Residual\)$",
    ),
    "arguments beside the weights": (
        lambda: {"model": dead().state_dict(), "args": argparse.Namespace(lr=0.1)},
        ["--key", "model"],
        r"is no file of tensors: save .*GLOBAL argparse\.Namespace\)$",
    ),
    "a tensor": (lambda: torch.ones(2), [], "no state dict in .*model.pt$"),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_says_why_and_what_to_try(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, arguments, message = CHECKPOINTS[what]
    with pytest.raises(SystemExit) as stop:
        main(["sparsity", MODEL, save(tmp_path / "model.pt", content()), *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "(EOFError: "),
        (b"hello there", "(KeyError: "),
        (b"PK\x03\x04", "(RuntimeError: "),
        (b'{"a": 1}', "(UnpicklingError: Unsupported operand 123)"),
    ],
    ids=["empty", "text", "half a zip", "json"],
)
def test_a_file_that_torch_did_not_write(
    content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        main(["sparsity", MODEL, str(path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"is no file of tensors: save model.state_dict() alone {reason}" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([MODEL, "--key", "model"], "--key: there is no checkpoint"),
        (["no.such.module:f"], "No module named"),
        (["pruning_models"], "expected package.module:function"),
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
