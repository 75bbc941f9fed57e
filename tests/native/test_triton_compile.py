"""The Triton kernels' machine code, read without a GPU: registers, spills and width of the accesses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from machine_code import ROOT, Kernel

ARCHS = [80, 90, 100]

# Some minutes of compiling on two cores.
pytestmark = pytest.mark.slow

SOURCES = ["flow_kernels", "filters", "groups_kernels"]
# (dtype, features, squared, elements): what is launched for one stage.
STAGES = [
    ("float32", 6, False, 1 << 18),
    ("float32", 6, True, 1 << 18),
    ("bfloat16", 6, False, 1 << 18),
    ("bfloat16", 6, True, 1 << 18),
    ("float32", 4, False, (1 << 18) + 1),  # no whole accesses
    ("float32", 4, True, (1 << 18) + 1),
]
STAGES_SM90 = [
    ("float16", 6, False, 1 << 18),
    ("float64", 6, False, 1 << 18),
    # Each step of the unrolled walk must release its registers: 64 features spilled before that was so.
    ("float32", 24, False, 1 << 18),
]


def compile_triton(arch: int | str, directory: Path) -> None:
    """In a process of its own, without the interpreter: writes the binaries and a list of what they are."""
    import torch
    from machine_code import compile_launch, recorded_launches

    from ffr_ext.kernels import filters, flow, groups, sizes

    warnings.simplefilter("error")  # Triton warns where it will change its mind
    index: list[dict[str, Any]] = []

    def add(name: str, launches: list[Any], **about: Any) -> None:
        for launch in launches:
            path = directory / f"{len(index)}.cubin"
            compiled = compile_launch(launch, arch).asm
            path.write_bytes(compiled["hsaco" if isinstance(arch, str) else "cubin"])
            kernel = launch[0].__name__
            # Loads outside of every branch (indented by 4) whose values are said to be multiples of something.
            hinted = re.findall(r"^ {4}\S+ = tt\.load .*tt\.divisibility.*", compiled["ttir"], re.MULTILINE)
            index.append(dict(name=f"{name} {kernel}", kernel=kernel, path=str(path), hinted=hinted, **about))

    for dtype_name, length, squared, numel in STAGES + (STAGES_SM90 if arch == 90 else []):
        dtype = getattr(torch, dtype_name)
        stage = [torch.empty(numel, dtype=dtype) for _ in range(length)]
        entries = torch.empty(2 * length - 3, dtype=torch.float64)
        signs = torch.empty(0 if squared else (length - 1) * flow.plane_bytes(numel), dtype=torch.uint8)
        read = stage if squared else []
        with recorded_launches() as launches:
            flow.flow_forward(stage, [length], [1], squared, entries, signs)
            flow.flow_backward(read, signs, entries, [length], [numel], [1], squared, stage)
            flow.flow_backward_at(read, signs, entries, length, numel, 1, squared, 2, stage[2], True)
        name = f"{dtype_name} {length} {'squares' if squared else 'signs'}"
        add(name, launches, vector=numel % 2 == 0, length=length, squared=squared)
    weights = [torch.empty(8, 3, 3, 3, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64)]
    dims = [0] * 3
    for norm in (1.0, 2.0, float("inf")):
        with recorded_launches() as launches:
            filters.filter_norms(weights, dims, norm, torch.empty(24, dtype=torch.float64))
        add(f"norm {norm}", launches, vector=True, length=3, squared=False)
    with recorded_launches() as launches:
        filters.compact_filters(weights, [torch.arange(4)] * 3, dims)
    add("compaction", launches, vector=True, length=3, squared=False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        accesses = sizes.PAIR_TILE // (32 * sizes.PAIR_WARPS * sizes.vector_length(dtype))
        weights = [torch.empty(128, 64, 3, 3, dtype=dtype)]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        rows, columns = [torch.empty(128, dtype=compute)], [torch.empty(64, dtype=compute)]
        for norm in (1.0, 2.0, float("inf")):
            with recorded_launches() as launches:
                filters.filter_norms(weights, [-1], norm, torch.empty(192, dtype=torch.float64))
            add(f"{dtype} norm {norm}", launches, vector=True, length=0, accesses=accesses)
        with recorded_launches() as launches:
            groups.add_scaled_(weights, weights, rows, columns, [0.0], [0.0])
        add(f"{dtype} add", launches, vector=True, length=2, accesses=accesses)
        with recorded_launches() as launches:
            groups.shrink_(weights, rows, columns, [0.0])
        add(f"{dtype} shrink", launches, vector=True, length=1, accesses=accesses)
    (directory / "index.json").write_text(json.dumps(index))


def compiled_index(arch: int | str, directory: Path) -> list[dict[str, Any]]:
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    done = subprocess.run(
        [sys.executable, __file__, str(arch), str(directory)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    index: list[dict[str, Any]] = json.loads((directory / "index.json").read_text())
    return index


def written_kernels() -> set[str]:
    source = "".join((ROOT / "ffr_ext/kernels" / f"{name}.py").read_text() for name in SOURCES)
    return set(re.findall(r"def (\w+_kernel)\(", source))


@pytest.fixture(scope="module", params=ARCHS, ids=lambda arch: f"sm_{arch}")
def triton_kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[dict[str, Any], Kernel]]:
    pytest.importorskip("triton")
    index = compiled_index(request.param, Path(tmp_path_factory.mktemp(f"triton{request.param}")))
    return [(item, kernel) for item in index for kernel in Kernel.all_of(Path(item["path"]))]


def test_every_triton_kernel_compiles(triton_kernels: list[tuple[dict[str, Any], Kernel]]) -> None:
    """The interpreter takes what the compiler refuses, such as a variable whose type depends on a branch."""
    assert {kernel.name for _, kernel in triton_kernels} == written_kernels()


def test_every_triton_kernel_compiles_for_an_amd_gpu(tmp_path: Path) -> None:
    """Compiled, never run: there is none here. ROCm's torch gets these by backend="auto"."""
    pytest.importorskip("triton.backends.amd")
    assert {item["kernel"] for item in compiled_index("gfx942", tmp_path)} == written_kernels()


def test_triton_kernels_use_no_local_memory(triton_kernels: list[tuple[dict[str, Any], Kernel]]) -> None:
    for item, kernel in triton_kernels:
        kernel._replace(name=item["name"]).assert_no_slow_memory()


def test_triton_kernels_access_16_bytes(triton_kernels: list[tuple[dict[str, Any], Kernel]]) -> None:
    from ffr_ext.kernels.sizes import FORWARD_ACCESSES

    for item, kernel in triton_kernels:
        loads, stores = kernel.widths("LDG"), kernel.widths("STG")
        features = item["length"]
        if not item["vector"]:
            assert 128 not in loads + stores, f"{item['name']}: a wide access over the end of a group"
        elif kernel.name == "forward_kernel":
            assert loads == [128] * (FORWARD_ACCESSES * features), item["name"]  # and nothing is loaded twice
        elif kernel.name == "backward_squares_kernel":
            assert 128 in stores, item["name"]
            assert [w for w in loads if w < 64] == [], item["name"]  # 64: the coefficients
        elif kernel.name == "backward_signs_kernel":
            assert set(stores) == {128}, item["name"]
        elif kernel.name == "pair_norms_kernel":
            assert loads.count(128) == item["accesses"], item["name"]  # in a loop of PAIR_PARTS
        elif kernel.name == "scale_kernel":  # length: tensors read
            assert loads.count(128) >= item["accesses"] * features, item["name"]
            assert stores.count(128) == item["accesses"], item["name"]


def test_what_holds_in_one_branch_is_hinted_there_only(
    triton_kernels: list[tuple[dict[str, Any], Kernel]],
) -> None:
    """`tl.multiple_of` marks the value, for all that use it: columns that are whole accesses in one branch were taken
    for that in the other, and the norms were wrong on a GPU. Other kernels are compiled for one case or the other."""
    branching = [
        item for item, _ in triton_kernels if item["kernel"] in ("pair_norms_kernel", "scale_kernel")
    ]
    assert branching
    for item in branching:
        assert item["hinted"] == [], item["name"]


def test_triton_forward_kernels_need_no_barrier(triton_kernels: list[tuple[dict[str, Any], Kernel]]) -> None:
    """A program is a warp and its sums are shuffles."""
    for item, kernel in triton_kernels:
        if kernel.name == "forward_kernel" and item["vector"]:
            slow = [i for i in kernel.code if i.kind in ("BAR", "LDS", "STS")]
            assert not slow, f"{item['name']}: {slow[:3]}"


def test_one_triton_kernel_serves_all_sizes_and_alignments() -> None:
    """A launch compiles for its dtype, number of features and VECTOR, not for values or addresses."""
    pytest.importorskip("triton")
    code = """
import torch
from machine_code import recorded_launches, specialization
from ffr_ext.kernels import flow

def keys(numel, offsets, groups=1):
    stage = [torch.empty(numel + 1)[o:][:numel] for o in offsets]
    stats = torch.empty(5 * groups, dtype=torch.float64)
    signs = torch.empty(3 * flow.plane_bytes(numel) if groups == 1 else 0, dtype=torch.uint8)
    with recorded_launches() as launches:
        flow.flow_forward(stage, [4], [groups], groups > 1, stats, signs)
        read = stage if groups > 1 else []
        flow.flow_backward(read, signs, stats, [4], [numel], [groups], groups > 1, stage)
    return [specialization(launch) for launch in launches]

aligned = [0, 0, 0, 0]
assert keys(4096, aligned) == keys(1 << 20, aligned) == keys(4096, [0, 0, 1, 1]) == keys(8000, [1, 0, 0, 0])
assert keys(4097, aligned) == keys(999, [1, 1, 1, 0]) != keys(4096, aligned)
assert keys(4096, [0] * 4, groups=2) == keys(8192, [0] * 4, groups=16)
"""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    compile_triton(int(sys.argv[1]) if sys.argv[1].isdigit() else sys.argv[1], Path(sys.argv[2]))
