"""The compaction benchmark runs, on small stand-ins, and its providers agree where they should."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.harness import networks
from benchmarks.harness.measure import QUICK, Options
from benchmarks.suites import compaction as bench_compaction

OPTIONS = Options(tiny=True, effort=dataclasses.replace(QUICK, memory=False))


def test_kernels() -> None:
    pytest.importorskip("transformers")
    rows = bench_compaction.kernel_rows(OPTIONS)
    assert {(r.mode, r.provider) for r in rows} >= {("gather", "index_select"), ("norms", "vector_norm")}
    assert all(r.error is None or r.error < 1e-6 for r in rows)


def test_kernels_are_measured_without_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_compaction, "_has", lambda module: False)
    monkeypatch.setattr(bench_compaction.networks, "resnet50", lambda: networks.cifar_resnet(8))
    rows = bench_compaction.main(OPTIONS)
    assert {r.mode for r in rows} == {"gather", "norms"}
    assert "not measured, transformers is not installed" in capsys.readouterr().out


def test_whole() -> None:
    pytest.importorskip("transformers")
    rows = bench_compaction.whole_rows(dataclasses.replace(OPTIONS, only=["constants"]))
    errors = {r.provider: r.error for r in rows}
    assert errors["compact"] is not None
    assert errors["compact"] < 1e-5
    if (
        "torch-pruning" in errors
    ):  # it drops the constants: the comparison would be empty if it did not matter
        assert errors["torch-pruning"] is not None
        assert errors["torch-pruning"] > 1e-3
