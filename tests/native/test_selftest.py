"""`selftest` passes with the kernels that are here, and fails when one of them is wrong."""

from __future__ import annotations

import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ffr_ext
from ffr_ext import ops

verification = importlib.import_module("ffr_ext.selftest")  # the package shows the function of that name


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer shapes: what is under test here is the comparison."""
    monkeypatch.setattr(verification, "SHAPES", verification.SHAPES[:2])


def test_every_backend_agrees_with_the_reference_and_the_command_says_so(fused: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ffr_ext", "selftest"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cpu" in done.stdout
    assert "all backends agree" in done.stdout


def _flip_last(name: str) -> Callable[..., None]:
    """The native kernel, with one element of its last output changed."""
    native = getattr(ops.FLOW_KERNELS["cpu"], name)

    def wrong(*args: Any) -> None:
        native(*args)
        filled = (*args[4:5], *args[7:8]) if name == "forward" else (args[7][-1],)  # stats and loss; grads
        for out in filled:
            if out is not None and out.numel():
                out.view(-1)[-1] += 1e-2

    return wrong


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_wrong_loss_kernel_makes_it_fail(
    name: str, small: None, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = ops.FLOW_KERNELS["cpu"]._replace(**{name: _flip_last(name)})
    monkeypatch.setitem(ops.FLOW_KERNELS, "cpu", wrong)
    printed = io.StringIO()
    outcome = ffr_ext.selftest("cpu", file=printed)
    assert not outcome
    assert "WRONG" in printed.getvalue()
    assert {c.what for c in outcome.checks if not c.ok} == {"loss, gradients"}


def test_a_kernel_that_leaves_nan_or_raises_makes_it_fail(
    small: None, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaves_nan(*args: Any) -> None:
        for grad in args[7]:
            grad.fill_(float("nan"))

    def raises(*args: Any) -> None:
        raise RuntimeError("no kernel image")

    right = ops.FLOW_KERNELS["cpu"]
    for backward in (leaves_nan, raises):
        wrong = right._replace(backward=backward)
        monkeypatch.setitem(ops.FLOW_KERNELS, "cpu", wrong)
        assert not ffr_ext.selftest("cpu", file=io.StringIO())


@pytest.mark.parametrize("name", ["add_scaled_", "shrink_"])
def test_a_wrong_group_kernel_makes_it_fail(
    name: str, small: None, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.kernel

    def wrong(asked: str, backend: str) -> Callable[..., Any]:
        op = right(asked, backend)
        if asked != name:
            return op

        def off_by_a_little(*args: Any) -> None:
            op(*args)
            args[0][0].view(-1)[-1] += 1

        return off_by_a_little

    monkeypatch.setattr(ops, "kernel", wrong)
    outcome = ffr_ext.selftest("cpu", file=io.StringIO())
    assert {c.what for c in outcome.checks if not c.ok} == {"group scaling"}


def test_a_wrong_pruning_kernel_makes_it_fail(
    small: None, fused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.kernel

    def wrong(name: str, backend: str) -> Callable[..., Any]:
        op = right(name, backend)
        if name != "compact_filters":
            return op
        return lambda tensors, keep, dims: op(tensors, [k.flip(0).contiguous() for k in keep], dims)

    monkeypatch.setattr(ops, "kernel", wrong)
    outcome = ffr_ext.selftest("cpu", file=io.StringIO())
    assert {c.what for c in outcome.checks if not c.ok} == {"compaction"}


def test_a_backend_that_is_not_there_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="opencl"):
        ffr_ext.selftest("opencl")
    with pytest.raises(ValueError, match="compared with"):
        ffr_ext.selftest("reference")
    if not torch.cuda.is_available():
        done = subprocess.run(
            [sys.executable, "-m", "ffr_ext", "selftest", "--backend", "cuda"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "selftest: backend='cuda'" in done.stderr
