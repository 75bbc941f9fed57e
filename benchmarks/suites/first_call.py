"""What the first call of a process costs: forward and backward in a fresh interpreter, imports not counted.

torch.compile and Triton keep compiled code on disk; "cold" is a machine that has never run this, "warm" the
next process on it. `python -m benchmarks.suites.first_call SETTING PROVIDER DEVICE` is the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from ..harness.loss_cases import PROVIDERS, Case
from ..harness.measure import Row
from ..harness.shapes import SETTINGS

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def first_call_rows(setting: str, providers: Sequence[str], device: torch.device | str) -> list[Row]:
    """One row per provider and state of the disk cache."""
    rows = []
    for provider in providers:
        with tempfile.TemporaryDirectory() as directory:
            states = ("cold", "warm") if provider in ("compile", "triton") else ("cold",)
            for state in states:
                rows.append(_first_call(setting, provider, state, str(device), directory))
    return rows


def _first_call(setting: str, provider: str, state: str, device: str, cache: str) -> Row:
    environment = {**os.environ, **{name: os.path.join(cache, name) for name in CACHES}}
    command = [sys.executable, "-m", "benchmarks.suites.first_call", setting, provider, device]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    return Row(
        bench="loss",
        case=found.pop("case"),
        provider=provider,
        mode="first" if state == "cold" else "first_warm",
        device=torch.device(device).type,
        ms=found["first_ms"],
        ms_p20=found["first_ms"],
        ms_p80=found["first_ms"],
        host_ms=found["first_ms"],
        samples=1,
        bytes=found.pop("bytes"),
        gbps=0.0,
        copy_percent=None,
        peak_bytes=None,
        allocated_bytes=None,
        error=None,
        config=found,
    )


def main(setting: str, provider: str, device: str) -> dict[str, object]:
    """Time the first call, and the second for comparison."""
    case = Case(SETTINGS[setting], SETTINGS[setting].batch_on(device))
    features = case.features(device)
    # What a training process has done by then: an autograd pass, and on a GPU a context and a kernel.
    torch.autograd.grad(torch.stack([f.mean() for f in features]).sum(), features)
    milliseconds: list[float] = []
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        if not milliseconds:
            run = PROVIDERS[provider](case)
        loss = run(features)
        torch.autograd.grad(loss, features)
        _wait(device)
        milliseconds.append((time.perf_counter() - start) * 1e3)
    return {
        "case": case.name,
        **case.config(),
        "bytes": case.moved_bytes("both"),
        "first_ms": milliseconds[0],
        "second_ms": milliseconds[1],
    }


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
