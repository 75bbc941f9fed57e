"""The FeatureFlow benchmark runs, its providers agree, and its peaks are those the taps promise."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness.measure import QUICK
from benchmarks.suites import feature_flow as bench


def test_it_prints_a_row_for_each_provider(capsys: pytest.CaptureFixture[str]) -> None:
    providers = ["eager", "ffr_loss", "FeatureFlow"]
    ((case, results),) = bench.main(["--device", "cpu", "--tiny", "--providers", *providers])
    assert case == bench.TINY[0]
    assert [result.provider for result in results] == [bench.PLAIN, *providers]
    assert all(result.error < 1e-6 for result in results[1:])
    text = capsys.readouterr().out
    assert all(provider in text for provider in providers)


@pytest.mark.parametrize(("norm", "most"), [("l1", 15.0), ("l2_squared", 15.0)])
def test_peak_memory(norm: str, most: float, fused: str) -> None:
    """l1: 11/12 of an eighth of the features' bytes for signs; values are there anyway."""
    case = bench.Case((4, 8, 64, 64), norm)
    results = bench.run_case(case, ["ffr_loss", "FeatureFlow"], torch.device("cpu"), QUICK)
    _, node, flow = (result.added_peak_percent for result in results)
    assert node > 90
    assert flow < most
