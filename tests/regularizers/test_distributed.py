"""Regularizers of weights on two gloo processes, in DDP and sharded by FSDP2: equal to one process with all data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import run_two
from weights_worker import MODES, smaller, train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All modes in one launch, which takes longer than the training; where the results lie, and what went wrong."""
    folder = tmp_path_factory.mktemp("weights")
    return folder, run_two("weights_worker.py", str(folder), *MODES)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one_does(two_processes: tuple[Path, str], mode: str) -> None:
    folder, errors = two_processes
    truth = train(mode)
    for rank in (0, 1):
        assert (folder / f"{mode} {rank}.pt").is_file(), errors
        ours = torch.load(folder / f"{mode} {rank}.pt")
        assert ours.keys() == truth.keys()
        for name, value in truth.items():
            message = f"rank {rank}, {name}"
            torch.testing.assert_close(
                ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, p=message: f"{p}: {m}"
            )
            assert bool((ours[name] == 0).eq(value == 0).all()), message


def test_it_makes_a_difference_to_train_with_one() -> None:
    """The comparison above would also hold for regularizers that do nothing."""
    results = {mode: train(mode)["0.weight"] for mode in MODES if mode.endswith("ddp")}
    values = list(results.values())
    for i, a in enumerate(values):
        assert all(not torch.equal(a, b) for b in values[i + 1 :] if a is not b), list(results)[i]


def test_networks_are_made_smaller_alike_on_all_ranks(two_processes: tuple[Path, str]) -> None:
    folder, errors = two_processes
    truth = smaller()
    for rank in (0, 1):
        assert (folder / f"smaller {rank}.pt").is_file(), errors
        ours = torch.load(folder / f"smaller {rank}.pt")
        assert ours.keys() == truth.keys()
        assert all(torch.equal(ours[name], value) for name, value in truth.items())


def test_ranks_that_would_go_apart_are_stopped(two_processes: tuple[Path, str]) -> None:
    folder, errors = two_processes
    for rank in (0, 1):
        assert (folder / f"apart {rank}.pt").is_file(), errors
        synthesis, stress, budget = torch.load(folder / f"apart {rank}.pt")
        assert "do not agree" in synthesis
        assert "seed them alike" in stress
        assert "do not agree" in budget
