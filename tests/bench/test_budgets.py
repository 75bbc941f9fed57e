# ruff: noqa: E402  (the repository is put on the path first)
"""Counted work stays within benchmarks/budgets.json: bytes, kernels, ops, Python calls, instructions.

None of these depends on the machine's speed. Raising a budget: `python -m benchmarks.budgets --write
--reason "..."`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import budgets
from ffr_ext import backends


def budget(name: str) -> dict[str, int]:
    """The committed budget of that name."""
    content: dict[str, int] = budgets.load()["budgets"][name]
    return content


@pytest.mark.parametrize("name", budgets.LOSSES)
def test_loss(name: str, fused: str) -> None:
    for counted_name, counted in budgets.count_loss(name, fused).items():
        assert not budgets.problems(counted_name, counted, budget(counted_name))


def test_feature_flow(fused: str) -> None:
    ((name, counted),) = budgets.count_flow(fused).items()
    assert not budgets.problems(name, counted, budget(name))


def test_filters(fused: str) -> None:
    for name, counted in budgets.count_filters(fused).items():
        assert not budgets.problems(name, counted, budget(name))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", budgets.LOSSES)
def test_loss_on_a_gpu(name: str, backend: str) -> None:
    status = backends.available()[backend]
    if not status.available:
        pytest.skip(f"backend {backend!r}: {status.reason}")
    committed = budgets.load()["budgets"]
    for counted_name, counted in budgets.count_loss(name, backend).items():
        if counted_name not in committed:
            pytest.skip(f"no budget for {counted_name} yet: python -m benchmarks.budgets --write")
        assert not budgets.problems(counted_name, counted, committed[counted_name])


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    missing = budgets.missing_for_native()
    if missing:
        pytest.skip(f"instructions cannot be counted: {missing}")
    if budgets.compiler_version() != budgets.load()["compiler"]:
        pytest.skip(
            f"the budgets are those of {budgets.load()['compiler']}, this is {budgets.compiler_version()}"
        )
    return budgets.build_native(tmp_path_factory.mktemp("native"))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["default", "avx2"])
@pytest.mark.parametrize(("kernel", "dtype"), budgets.NATIVE)
def test_instructions(kernel: str, dtype: str, isa: str, programs: Path) -> None:
    name = budgets.native_name(kernel, dtype, isa)
    counted = budgets.count_native(programs, kernel, dtype, isa)
    if counted is None:
        pytest.skip(f"this processor has no {isa}")
    assert not budgets.problems(name, counted, budget(name))


@pytest.mark.parametrize(
    ("got", "complaint"),
    [
        (100, None),
        (114, None),  # within the tolerance of other versions
        (116, "the budget is 100"),
        (71, None),
        (69, "lower it"),
    ],
)
def test_problems(got: int, complaint: str | None) -> None:
    found = budgets.problems("name", {"ops": got}, {"ops": 100})
    assert len(found) == (complaint is not None)
    assert complaint is None or complaint in found[0]


def test_raising_needs_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower and new numbers are taken over; a higher one only with a reason, which is kept."""
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"budgets": {"a": {"ops": 10, "bytes": 10}}, "raised": []}))
    monkeypatch.setattr(budgets, "FILE", file)
    monkeypatch.setattr(budgets, "count_here", lambda: {"a": {"ops": 20, "bytes": 5}, "b": {"ops": 1}})
    monkeypatch.setattr(budgets, "missing_for_native", lambda: "not now")
    budgets.main(["--write"])
    assert budgets.load() == {"budgets": {"a": {"ops": 10, "bytes": 5}, "b": {"ops": 1}}, "raised": []}
    budgets.main(["--write", "--reason", "it now does more"])
    assert budgets.load()["budgets"]["a"] == {"ops": 20, "bytes": 5}
    assert budgets.load()["raised"] == [{"reason": "it now does more", "what": ["a ops 10 -> 20"]}]


def test_a_copy_of_the_features_would_be_noticed(fused: str) -> None:
    """The guard guards: one more allocation of one feature breaks the budget of the forward pass."""
    name, counted = next(iter(budgets.count_loss("resnet20", fused).items()))
    feature = 2 * 16 * 32 * 32 * torch.float32.itemsize
    more = {**counted, "bytes": counted["bytes"] + feature}
    assert budgets.problems(name, more, budget(name))
