"""Which share of a GPU's memory speed the flow kernels' machine code leaves possible: a model, not a measurement.

    python tools/gpu_model.py

compiles csrc/cuda/flow_*.cu (needs nvcc and cuobjdump, no GPU), counts registers and instructions, and prints the
tables of docs/performance/gpu.md. Two limits are looked at, as if each were alone and everything else perfect:

- what a multiprocessor has in flight, over what its share of the memory delivers in a load's latency (Little's law);
- the instructions that it can issue while its share of the memory moves an access, over those that it takes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_check
import cuda_toolkit
from sass import FlowKernel, Instruction, listings, loops, path_to, resources, wide

LATENCY_NS = 700.0  # of a load under load: an assumption, not in any data sheet
WARP_ACCESS = 512  # 32 threads x 16 bytes
THREADS = 256
REGISTERS = 65536  # of a multiprocessor, which has four schedulers and holds 64 warps, sm_80 to sm_100
SCHEDULERS = 4


class Gpu(NamedTuple):
    """Of the data sheets: memory speed, and as clock the one that the dense bf16 peak is given for."""

    name: str
    arch: str
    multiprocessors: int
    ghz: float
    tb_per_s: float

    @property
    def bytes_per_ns(self) -> float:
        """Of one multiprocessor."""
        return 1000 * self.tb_per_s / self.multiprocessors


GPUS = (
    Gpu("A100 SXM 80 GB", "80", 108, 1.41, 2.039),  # 312 TFLOP/s = 108 x 1.41 GHz x 2048
    Gpu("H100 SXM", "90", 132, 1.83, 3.35),  # 989 TFLOP/s = 132 x 1.83 GHz x 4096
    Gpu("H200", "90", 132, 1.83, 4.8),
    Gpu("B200", "100", 148, 1.86, 8.0),  # 2250 TFLOP/s = 148 x 1.86 GHz x 8192
)


class Work(NamedTuple):
    """Of a warp: bytes of one access with all that belongs to it, and bytes it has in flight."""

    read: float
    written: float
    ahead: int  # such reads in flight


def work_of(kernel: FlowKernel) -> Work:
    """Long stages: a plane of signs for every feature."""
    plane = WARP_ACCESS / (8 if kernel.dtype == "fp32" else 4)  # half a byte an element
    signs = kernel.reads == "signs"
    if kernel.template == "forward":
        return Work(WARP_ACCESS, plane if signs else 0, 4)
    if kernel.template == "backward":
        return Work(plane if signs else WARP_ACCESS, WARP_ACCESS, 4)
    return Work(WARP_ACCESS + (3 * plane if signs else 5 * WARP_ACCESS), WARP_ACCESS, 1)  # accumulated


def instructions_of(kernel: FlowKernel, code: list[Instruction]) -> float:
    """Of a warp's access: in the loop over four features, or, of one gradient, of a warp that has one tile."""
    if kernel.template != "gradient":
        kind = "LDG" if kernel.template == "forward" else "STG"
        return len(next(loop for loop in loops(code) if len(wide(loop, kind)) == 4)) / 4
    (store,) = wide(code, "STG")
    chosen = next(
        place for place, i in enumerate(code) if i.kind == "BRA" and i.guard
    )  # whole accesses or not
    return chosen + 1 + sum(i.address > code[chosen].address for i in path_to(code, store))


def warps_of(registers: int) -> int:
    """Resident on a multiprocessor, in blocks of 256 threads; registers come in eights."""
    blocks = REGISTERS // (-(-registers // 8) * 8 * THREADS)
    return min(blocks * THREADS // 32, 64)


class Limits(NamedTuple):
    in_flight: float
    issue: float

    @property
    def share(self) -> float:
        return min(self.in_flight, self.issue, 1.0)

    def __str__(self) -> str:
        named = "" if self.share == 1 else " flight" if self.in_flight < self.issue else " issue"
        return f"{100 * self.share:.0f} %{named}"


def limits(gpu: Gpu, work: Work, registers: int, instructions: float) -> Limits:
    """Of the memory's speed, the shares that bytes in flight and issue slots allow; above 1 there is room."""
    moved = work.read + work.written
    in_flight = warps_of(registers) * work.ahead * work.read
    wanted = LATENCY_NS * gpu.bytes_per_ns * work.read / moved
    slots = moved / gpu.bytes_per_ns * gpu.ghz * SCHEDULERS
    return Limits(in_flight / wanted, slots / instructions)


NAMES = {
    ("forward", "signs"): "forward, l1 with signs",
    ("forward", "squares"): "forward, squares",
    ("backward", "signs"): "backward from signs",
    ("backward", "squares"): "backward of squares",
    ("gradient", "signs"): "one gradient, added, from signs",
    ("gradient", "squares"): "one gradient, added, of squares",
}
Counts = dict[tuple[FlowKernel, str], tuple[int, float]]


def counted() -> Counts:
    """Registers and instructions of an access, of every kernel and architecture."""
    out = cuda_check.ROOT / "build" / "gpu_model"
    out.mkdir(parents=True, exist_ok=True)
    nvcc = cuda_toolkit.find_toolkit().nvcc
    counts: Counts = {}
    for arch in sorted({gpu.arch for gpu in GPUS}, key=int):
        for source in ("flow_forward", "flow_backward", "flow_backward_at"):
            cuda_check.compile_one(nvcc, cuda_check.ROOT / f"csrc/cuda/{source}.cu", arch, out)
            cubin = out / f"{source}.sm_{arch}.cubin"
            for name, code in listings(cubin).items():
                kernel = FlowKernel.of(name)
                if kernel is not None:
                    counts[kernel, arch] = resources(cubin)[name].registers, instructions_of(kernel, code)
    return counts


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    counts = counted()
    archs = sorted({gpu.arch for gpu in GPUS}, key=int)
    kernels = [FlowKernel(template, dtype, reads) for template, reads in NAMES for dtype in ("fp32", "bf16")]
    print(row(["kernel", *(f"sm_{arch}: registers, warps, KiB in flight, instructions" for arch in archs)]))
    print(row(["---"] * (1 + len(archs))))
    for kernel in kernels:
        cells = [f"{NAMES[kernel.template, kernel.reads]}, {kernel.dtype}"]
        for arch in archs:
            registers, instructions = counts[kernel, arch]
            work, warps = work_of(kernel), warps_of(registers)
            flight = warps * work.ahead * work.read / 1024
            cells.append(f"{registers}, {warps}, {flight:.0f}, {instructions:.0f}")
        print(row(cells))
    print()
    print(row(["share of the memory's speed", *(f"{gpu.name}, {gpu.tb_per_s:g} TB/s" for gpu in GPUS)]))
    print(row(["---"] * (1 + len(GPUS))))
    for kernel in kernels:
        found = [str(limits(gpu, work_of(kernel), *counts[kernel, gpu.arch])) for gpu in GPUS]
        print(row([f"{NAMES[kernel.template, kernel.reads]}, {kernel.dtype}", *found]))


if __name__ == "__main__":
    main()
