"""The CUDA kernels' machine code, read without a GPU: registers, spills, local memory, width and order of the accesses.

Slow memory hides where no result shows it: in local memory (spills, arrays indexed at run time), in narrow accesses,
and in loads that wait for one another. The compiler's resource report and the disassembly name all of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from machine_code import ROOT, Kernel, needs_cuobjdump
from sass import Code, FlowKernel, instructions_until_used, loops, path_to, round_trips, wide

ARCHS = [80, 90, 100, 120]
SOURCES = ["flow_forward", "flow_backward", "flow_backward_at", "filters", "group_norms", "group_scaling"]

pytestmark = [
    pytest.mark.slow,  # some minutes of compiling on two cores
    needs_cuobjdump,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH"),
    pytest.mark.parametrize("arch", ARCHS),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], list[Kernel]]:
    """Every kernel of every source for every architecture."""
    directory = Path(tmp_path_factory.mktemp("cubins"))

    def compile_one(key: tuple[int, str]) -> list[Kernel]:
        arch, source = key
        cubin = directory / f"{source}.{arch}.cubin"
        command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Werror=all-warnings"]
        command += [f"-arch=sm_{arch}", "-cubin", "-o", str(cubin), str(ROOT / f"csrc/cuda/{source}.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return Kernel.all_of(cubin)

    keys = [(arch, source) for arch in ARCHS for source in SOURCES]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(keys, pool.map(compile_one, keys), strict=True))


def flow_kernels(kernels: dict[tuple[int, str], list[Kernel]], arch: int, template: str) -> dict[str, Kernel]:
    """The instances of a template by their arguments: "bf16 signs"."""
    found = {}
    for source in SOURCES[:3]:
        for kernel in kernels[arch, source]:
            which = FlowKernel.of(kernel.name)
            if which is not None and which.template == template:
                found[f"{which.dtype} {which.reads}"] = kernel
    return found


def loop_with(kernel: Kernel, kind: str, accesses: int) -> Code:
    """The innermost loop with so many 16-byte accesses: whole tiles', not the one for single elements."""
    (found,) = [loop for loop in loops(kernel.code) if len(wide(loop, kind)) == accesses]
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_kernels_use_no_local_memory(arch: int, source: str, kernels: Any) -> None:
    assert kernels[arch, source]
    for kernel in kernels[arch, source]:
        kernel.assert_no_slow_memory()


def test_flow_kernels_access_16_bytes(arch: int, kernels: Any) -> None:
    forward = flow_kernels(kernels, arch, "forward")
    backward = flow_kernels(kernels, arch, "backward")
    gradient = flow_kernels(kernels, arch, "gradient")
    assert len(forward) == 12  # 4 dtypes, and 3 of: sums, sums and signs, squares
    assert len(backward) == len(gradient) == 8
    for which, kernel in forward.items():
        # The first feature and four more at the start, and four more in the loop.
        assert kernel.widths("LDG").count(128) == 9, which
    for which, kernel in backward.items():
        assert kernel.widths("STG").count(128) >= 4, which
    for which, kernel in gradient.items():
        # The old gradient, and five features.
        assert kernel.widths("LDG").count(128) == (1 if "signs" in which else 6), which
        assert kernel.widths("STG").count(128) == 1, which


def test_the_forward_kernel_with_signs_loads_long_before_it_waits(arch: int, kernels: Any) -> None:
    """Loads do not move across stores. Each one after the signs of a feature had 44 to 49 % of a round between it and
    its use (78 % in fp32 on sm_100): the other loads were behind it, and waited for first."""
    for which, kernel in flow_kernels(kernels, arch, "forward").items():
        if which.endswith("signs"):
            loop = loop_with(kernel, "LDG", 4)
            assert min(instructions_until_used(loop)) >= 0.66 * len(loop), which


@pytest.mark.parametrize(
    ("template", "kind", "most"),
    [
        # Addresses that were made anew at each load took 15 instructions of each access.
        ("forward", "LDG", {"fp32 sums": 44, "fp32 squares": 44, "fp32 signs": 85, "bf16 squares": 71}),
        # The code for `accumulate` was in the loop: 83 and 133 from signs, 80 and 149 from features.
        ("backward", "STG", {"fp32 signs": 75, "bf16 signs": 112, "fp32 squares": 73, "bf16 squares": 128}),
    ],
)  # fmt: skip
def test_instructions_of_an_access(
    arch: int, template: str, kind: str, most: dict[str, int], kernels: Any
) -> None:
    """Of a warp's 16-byte access of one feature, in the loop over features."""
    if template == "forward":  # bf16 is compared in pairs from sm_90 on
        most = {**most, "bf16 signs": 147 if arch == 80 else 117}
    for which, kernel in flow_kernels(kernels, arch, template).items():
        if which in most:
            assert len(loop_with(kernel, kind, 4)) <= 4 * most[which], which


def test_the_gradient_of_one_feature_waits_for_memory_once(arch: int, kernels: Any) -> None:
    """It took four waits in a row: the coefficients, the block's barrier, the signs, the old gradient."""
    for which, kernel in flow_kernels(kernels, arch, "gradient").items():
        (store,) = wide(kernel.code, "STG")
        path = path_to(kernel.code, store)
        # Coefficients, old gradient, and three planes or five features.
        assert len([i for i in path if i.kind == "LDG"]) == (5 if "signs" in which else 7), which
        assert round_trips(path) == 1, which


def test_no_warp_waits_for_its_block_on_the_way_back(arch: int, kernels: Any) -> None:
    for template in ("backward", "gradient"):
        for which, kernel in flow_kernels(kernels, arch, template).items():
            assert not [i for i in kernel.code if i.kind == "BAR"], (template, which)


def test_kernels_for_groups_access_16_bytes_and_each_once(arch: int, kernels: Any) -> None:
    """Per thread: 8 rows of a weight for the norms; 4 accesses of a weight, and of a gradient where there is one."""
    norms = [k for k in kernels[arch, "group_norms"] if "pair_norms_kernel" in k.name]
    scaling = kernels[arch, "group_scaling"]
    assert len(norms) == 12  # 4 dtypes, 3 norms
    assert len(scaling) == 8  # 4 dtypes, add or shrink
    for kernel in norms:
        assert kernel.widths("LDG").count(128) == 8, kernel.name
    for kernel in scaling:
        shrink = "Lb1" in kernel.name
        assert kernel.widths("LDG").count(128) == (4 if shrink else 8), kernel.name
        assert kernel.widths("STG").count(128) == 4, kernel.name


def test_kernels_leave_room_for_enough_warps(arch: int, kernels: Any) -> None:
    """16 warps on a multiprocessor (65536 registers), each with four 512-byte loads in flight, are 32 KiB: more
    than the 25 KiB an H200 needs."""
    for source in SOURCES:
        for kernel in kernels[arch, source]:
            if source != "filters":
                assert kernel.registers <= 128, f"{kernel.name}: {kernel.registers} registers"
