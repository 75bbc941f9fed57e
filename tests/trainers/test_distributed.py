"""FeatureFlow on two gloo processes gives the gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ddp_worker import OPTIONS, STEPS
from flow_models import Tower
from processes import run_two
from torch import Tensor, nn

from ffr_ext import FeatureFlow

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)


def one_process() -> list[list[Tensor]]:
    torch.manual_seed(0)
    model = Tower()
    x, y = Tower.data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    with FeatureFlow(model, **OPTIONS) as flow:
        for _ in range(STEPS):
            optimizer.zero_grad()
            (nn.functional.cross_entropy(model(x), y) + flow.loss()).backward()
            history.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            optimizer.step()
    return history


MODES = [
    "ddp",
    "ddp unused",  # find_unused_parameters=True
    "ddp static",  # static_graph=True
    "ddp no_sync",  # two micro-batches a step, the first without communication
    "ddp static no_sync",
    "ddp compile",  # torch.compile around DDP, whose optimizer splits the graph at its buckets
    "fsdp2",
    "fsdp2 attach first",
]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All modes in one launch, which takes longer than the training; where the results lie, and what went
    wrong."""
    folder = tmp_path_factory.mktemp("gradients")
    return folder, run_two("ddp_worker.py", str(folder), *MODES, timeout=180)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_gradients_of_one(two_processes: tuple[Path, str], mode: str) -> None:
    folder, errors = two_processes
    assert (folder / f"{mode}.pt").is_file(), errors
    for step, (ours, truth) in enumerate(zip(torch.load(folder / f"{mode}.pt"), one_process(), strict=True)):
        assert len(ours) == len(truth)
        for index, (a, b) in enumerate(zip(ours, truth, strict=True)):
            message = f"step {step}, parameter {index}"
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, p=message: f"{p}: {m}")
