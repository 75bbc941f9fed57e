# ruff: noqa: E402  (the repository is put on the path first)
"""The GPU benchmark and `gpu_check.sh` keep what they have when something fails, as far as that shows without a GPU."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `benchmarks` is not part of the package: it lives in the repository alone

from benchmarks.suites import gpu_loss as bench_gpu_loss


def tiny_stage(batch: int) -> bench_gpu_loss.Setting:
    return bench_gpu_loss.Setting(
        f"batch {batch}", [bench_gpu_loss.Stage(3, batch * 64)], torch.float32, batch
    )


def test_gpu_benchmark_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fused: str
) -> None:
    """A setting that fails halfway costs its own missing rows; no git and no nvidia-smi cost nothing."""

    def settings(smoke: bool, full: bool) -> list[bench_gpu_loss.Setting]:
        return [tiny_stage(1), tiny_stage(2)]

    def compiler(function: Any, **options: Any) -> Any:
        def compiled(features: Any, norm: str) -> torch.Tensor:
            if len(features[0]) == 1:
                raise torch.OutOfMemoryError("a compiler that takes too much")
            result: torch.Tensor = function(features, norm=norm)
            return result

        return compiled

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_gpu_loss, "settings", settings)
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setenv("FFR_RESULTS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bench_gpu_loss.main(["--smoke", "--budget", "0"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: batch 1, torch.float32" in printed
    record = json.loads((tmp_path / "gpu_loss.json").read_text())
    assert record["environment"]["commit"] == "unknown"
    measured = [(row["setting"], row["norm"], row["what"], row["provider"]) for row in record["rows"]]
    kernels = [("l1", kernel, "cpu") for kernel in ("forward", "backward", "backward_at")]
    assert measured[:3] == [("batch 1", *kernel) for kernel in kernels]
    assert measured[3:6] == [("batch 2", *kernel) for kernel in kernels]
    assert ("batch 2", "l2_squared", "loss and gradients", "torch.compile") in measured
    assert len((tmp_path / "gpu_loss.csv").read_text().splitlines()) == 1 + len(measured)


def test_bytes_of_gradients_one_by_one() -> None:
    """4 features of 64 elements: 8 planes of 32 bytes are read for l1, 14 features for l2; gradients are added to."""
    setting = bench_gpu_loss.Setting("", [bench_gpu_loss.Stage(4, 64)], torch.float32, 1)
    assert bench_gpu_loss.must_move(setting, "backward_at", "l1") == 8 * 32 + 8 * 256
    assert bench_gpu_loss.must_move(setting, "backward_at", "l2_squared") == 14 * 256 + 8 * 256


def test_gradients_one_by_one_add_up_to_those_of_all(fused: str) -> None:
    setting = bench_gpu_loss.Setting("", [bench_gpu_loss.Stage(n, 70) for n in (4, 3)], torch.float32, 1)
    features = bench_gpu_loss.make_features(setting, "cpu")
    for norm in ("l1", "l2_squared"):
        torch.manual_seed(0)
        runs = bench_gpu_loss.kernel_runs(setting, features, norm, fused)
        runs["forward"]()
        runs["backward"]()
        grads = inspect.getclosurevars(runs["backward"]).nonlocals["grads"]
        once = [grad.clone() for grad in grads]
        runs["backward_at"]()
        for grad, first in zip(grads, once, strict=True):
            torch.testing.assert_close(grad, 2 * first)


def test_gpu_benchmark_compiles_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limit of recompilations Dynamo runs a function eagerly, and its time would be called compiled."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(1)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **o: compile_(function, backend=backend, **o))
    shapes = torch._dynamo.config.recompile_limit + 2
    for batch in range(1, 1 + shapes):
        features = bench_gpu_loss.make_features(tiny_stage(batch), "cpu")
        bench_gpu_loss.loss_runs(features, "l1", [])["torch.compile"]()
    assert len(compiled) == shapes


PYTHON_ON_A_GPU_MACHINE = """#!/bin/sh
case "$*" in
  -c*) echo 90 ;;
  *pip*) echo "archs $FFR_EXT_CUDA_ARCHS" ;;
  *pytest*) echo "1 failed"; exit 1 ;;
  *suites.gpu_loss*) echo "10 features, 256 MiB  float32  l1  cuda forward  95.0" ;;
  *compaction*) echo "resnet50  gather  cuda  0.0400 ms [0.0390, 0.0420]"; echo "wrote it" ;;
  *step-compiled*) echo "resnet50x256/bfloat16/channels_last  step  ffr_loss  40.0 ms [39.0, 42.0]" ;;
  *) echo "$3 is fine" ;;
esac
"""


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (
            [],
            [
                "build",
                "info",
                "selftest",
                "test_gpu",
                "sanitizer",
                "gpu_loss",
                "compaction",
                "training",
                "compiled",
            ],
        ),
        (["quick"], ["build", "info", "selftest", "test_gpu"]),
        (["gpu_loss", "info"], ["info", "gpu_loss"]),
    ],
)
def test_gpu_check_runs_its_steps(arguments: list[str], steps: list[str], tmp_path: Path) -> None:
    """A step that fails keeps none of the others from running, and is said at the end."""
    python = tmp_path / "python"
    python.write_text(PYTHON_ON_A_GPU_MACHINE)
    python.chmod(0o755)
    out = tmp_path / "out"
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "FFR_RESULTS_DIR": str(out)}
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == ("test_gpu" in steps), done.stdout + done.stderr
    lines = (out / "summary.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == steps
    failed = [line.split()[0] for line in lines if "FAILED" in line]
    assert failed == [step for step in steps if step == "test_gpu"]
    log = (out / "gpu_check.log").read_text()
    assert ("archs 90" in log) == ("build" in steps)
    assert ("cuda forward  95.0" in done.stdout) == ("gpu_loss" in steps)
    assert ("gather  cuda  0.0400 ms" in done.stdout) == ("compaction" in steps)
    assert ("ffr_loss  40.0 ms" in done.stdout) == ("compiled" in steps)


def test_gpu_check_knows_its_steps() -> None:
    command = ["bash", str(ROOT / "benchmarks/gpu_check.sh"), "bench"]
    done = subprocess.run(command, env={**os.environ, "PYTHON": "false"}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no step bench" in done.stderr
