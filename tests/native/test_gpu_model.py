"""tools/gpu_model.py: its two limits, worked by hand. What it counts is held by `test_gpu_compile.py`."""

from __future__ import annotations

import sys

import pytest
from machine_code import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from gpu_model import Gpu, Work, limits, warps_of, work_of
from sass import FlowKernel

# 20 bytes a nanosecond for each of 100 multiprocessors, which have 4 issue slots in a nanosecond.
GPU = Gpu("round", "90", 100, 1.0, 2.0)


@pytest.mark.parametrize(
    ("registers", "warps"), [(128, 16), (121, 16), (80, 24), (64, 32), (48, 40), (20, 64)]
)
def test_registers_decide_how_many_warps_are_resident(registers: int, warps: int) -> None:
    assert warps_of(registers) == warps


def test_reads_in_flight_must_cover_the_latency_for_their_part_of_the_traffic() -> None:
    # 16 warps x 1 x 250 bytes are there; 700 ns x 20 bytes, half of which are read, are wanted.
    found = limits(GPU, Work(read=250, written=250, ahead=1), registers=128, instructions=1)
    assert found.in_flight == pytest.approx(4000 / 7000)
    assert str(found) == "57 % flight"


def test_an_access_must_be_issued_while_its_bytes_are_moved() -> None:
    # 1000 bytes take 50 ns, which are 200 slots.
    found = limits(GPU, Work(read=1000, written=0, ahead=4), registers=128, instructions=400)
    assert found.issue == pytest.approx(0.5)
    assert str(found) == "50 % issue"
    assert str(limits(GPU, Work(1000, 0, 4), 128, 100)) == "100 %"


def test_bytes_of_an_access_are_those_of_the_table_of_bytes() -> None:
    """docs/performance/gpu.md: bytes per element."""
    for dtype, elements, expected in [
        ("fp32", 128, (4.5, 4.5, 8, 9.5, 28)),
        ("bf16", 256, (2.5, 2.5, 4, 5.5, 14)),
    ]:
        kernels = [("forward", "signs"), ("backward", "signs"), ("backward", "squares")]
        kernels += [("gradient", "signs"), ("gradient", "squares")]
        for (template, reads), wanted in zip(kernels, expected, strict=True):
            work = work_of(FlowKernel(template, dtype, reads))
            assert (work.read + work.written) / elements == wanted


def test_kernels_are_told_apart_by_their_mangled_names() -> None:
    named = "_ZN3ffr4cuda12_GLOBAL__N__14forward_kernelINS_8BFloat16ELNS1_4ModeE1EEEvNS1_11ForwardArgsE"
    assert FlowKernel.of(named) == ("forward", "bf16", "signs")
    assert FlowKernel.of("_ZN15gradient_kernelIfLb1EEEvNS1_12GradientArgsE") == (
        "gradient",
        "fp32",
        "squares",
    )
    assert FlowKernel.of("_ZN16add_slots_kernelENS1_7AddArgsE") is None
