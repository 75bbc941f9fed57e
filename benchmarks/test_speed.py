"""`pytest benchmarks/` with pytest-benchmark: the loss, forward and backward, by the providers of this
machine.

For quick comparisons between two versions (`--benchmark-autosave`, `--benchmark-compare`). The results that
are kept are those of `python -m benchmarks`, which measures the providers in turns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .harness.loss_cases import PROVIDERS, Case, providers_here
from .harness.shapes import SETTINGS

pytest.importorskip("pytest_benchmark", reason="pytest benchmarks/ needs pytest-benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("provider", [p for p in providers_here(DEVICE) if p != "compile"])
@pytest.mark.parametrize("name", ["tiny3", "resnet20", "resnet56", "vgg16"])
def test_forward_and_backward(benchmark: Any, name: str, provider: str) -> None:
    case = Case(SETTINGS[name], SETTINGS[name].batch_on(DEVICE))
    run, features = PROVIDERS[provider](case), case.features(DEVICE)

    def both() -> None:
        torch.autograd.grad(run(features), features)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(case.config())
    benchmark(both)
