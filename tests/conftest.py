"""Fixtures shared by all tests: a fixed seed, one compiler cache per run, and the skip of GPU tests with its reason."""

from __future__ import annotations

import pytest
import torch

import ffr_ext
from ffr_ext import backends


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")


def pytest_report_header() -> list[str]:
    states = ", ".join(
        f"{name} {'yes' if state.available else 'no'}" for name, state in backends.available().items()
    )
    return [f"ffr_ext {ffr_ext.__version__}, torch {torch.__version__}, backends: {states}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that takes CPU tensors in this process."""
    name: str = request.param
    status = backends.available()[name]
    if not status.available:
        pytest.skip(f"backend {name!r}: {status.reason}")
    return name


@pytest.fixture
def fused() -> str:
    """The fused backend for CPU tensors."""
    status = backends.available()["cpu"]
    if not status.available:
        pytest.skip(f"backend 'cpu': {status.reason}")
    return "cpu"
