"""The penalty adds few kernels and few saved bytes to a compiled step: counted in the code that Inductor generates."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # `benchmarks` is not part of the package

from benchmarks import compiled_budgets as budgets
from benchmarks.suites.step import StepCase


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="without oneDNN convolutions stay contiguous"
)
@pytest.mark.parametrize("case", budgets.CASES, ids=lambda case: case.network)
def test_what_the_penalty_adds_stays_within_its_budget(case: StepCase) -> None:
    content = budgets.load()
    for name, counted in budgets.added(case).items():
        assert not budgets.problems(name, counted, content)


def test_a_saved_copy_and_a_transposition_would_be_noticed() -> None:
    content = budgets.load()
    for name, budget in content["budgets"].items():
        feature = 4 * 16 * 16 * 16 * 4
        assert not budgets.problems(name, budget, content)
        for key, more in (
            ("saved_bytes", feature),
            ("transposed", 1),
            ("kernels", 1 + budgets.OTHER_KERNELS),
        ):
            assert budgets.problems(name, {**budget, key: budget[key] + more}, content)
