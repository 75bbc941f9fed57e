"""Compiles every CUDA kernel for every architecture, without linking, and prints what ptxas says about it.

    python tools/cuda_check.py [--archs "80;90"] [--out build/cuda_check] [file.cu ...]

Needs nvcc, but neither a GPU nor torch: it is how a machine without a GPU notices a kernel that does not
compile, spills registers or outgrows shared memory. Exit status 1 if a compilation fails, or if a kernel
spills more than a few bytes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent

# The flags of CMakeLists.txt.
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-I", str(ROOT / "csrc"))


class Usage(NamedTuple):
    """What one kernel takes on one architecture, from ptxas."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


class CompileError(Exception):
    """nvcc refused a file; carries its output."""


def compile_one(nvcc: Path, source: Path, arch: str, out: Path) -> list[Usage]:
    """Makes ``out/NAME.sm_ARCH.cubin`` and returns the resources of its kernels."""
    cubin = out / f"{source.stem}.sm_{arch}.cubin"
    command = [str(nvcc), *FLAGS, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return parse_ptxas(done.stdout + done.stderr, arch)


def parse_ptxas(text: str, arch: str) -> list[Usage]:
    """The report of ``ptxas -v``: an entry function's name, then its stack and spills, then its registers."""
    usages = []
    for block in re.split(r"Compiling entry function '", text)[1:]:
        kernel = block.split("'", 1)[0]
        registers = re.search(r"Used (\d+) registers", block)
        if registers is None:
            raise CompileError(f"ptxas says nothing about the registers of {kernel}:\n{block}")
        shared = re.search(r"(\d+) bytes smem", block)
        stack = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        )
        usages.append(
            Usage(
                kernel,
                arch,
                int(registers[1]),
                int(shared[1]) if shared else 0,
                int(stack[1]) if stack else 0,
                int(stack[2]) + int(stack[3]) if stack else 0,
            )
        )
    return usages


def demangle(names: list[str], nvcc: Path) -> dict[str, str]:
    """Readable names, with nvcc's own cu++filt or binutils' c++filt; the mangled ones if neither is there."""
    tool = shutil.which("cu++filt", path=str(nvcc.resolve().parent)) or shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def short(signature: str) -> str:
    """``void ffr::kernel<float, 4>(args)`` without return type, namespaces and parameter list."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\b\w+::|^void ", "", signature)
    if not name.endswith(")"):
        return name
    depth = 0
    for position in range(len(name) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(name[position], 0)
        if depth == 0:
            return name[:position]
    return name


def report(usages: list[Usage], readable: dict[str, str]) -> str:
    """One line per kernel and set of equal resources, with the architectures that share them."""
    lines = [f"{'registers':>9} {'shared':>7} {'stack':>6} {'spills':>7}  {'sm':<16} kernel"]
    together: dict[tuple[str, int, int, int, int], list[str]] = {}
    for usage in usages:
        key = (short(readable[usage.kernel]), usage.registers, usage.shared, usage.stack, usage.spills)
        together.setdefault(key, []).append(usage.arch)
    for (kernel, registers, shared, stack, spills), archs in sorted(together.items()):
        lines.append(f"{registers:>9} {shared:>7} {stack:>6} {spills:>7}  {','.join(archs):<16} {kernel}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", default=os.environ.get("FFR_EXT_CUDA_ARCHS", ""), help="e.g. 90 or 80;90")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "cuda_check", help="where the cubins go")
    # Under a cap on registers ptxas parks a value or two on one architecture and none on the next.
    parser.add_argument(
        "--max-spills", type=int, default=16, metavar="BYTES", help="per kernel; default %(default)s"
    )
    parser.add_argument("files", type=Path, nargs="*", help="default: csrc/cuda/*.cu")
    arguments = parser.parse_args()
    try:
        toolkit = cuda_toolkit.find_toolkit()
        archs = [arch.removesuffix("+PTX") for arch in cuda_toolkit.choose_archs(toolkit, arguments.archs)]
    except cuda_toolkit.ToolkitError as error:
        print(f"cuda_check: {error}", file=sys.stderr)
        return 1
    files = arguments.files or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if not files:
        print("cuda_check: no .cu file in csrc/cuda")
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [(file, arch) for file in files for arch in archs]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = [pool.submit(compile_one, toolkit.nvcc, file, arch, arguments.out) for file, arch in jobs]
    failures = [str(result.exception()) for result in results if result.exception() is not None]
    if failures:
        print("\n\n".join(failures), file=sys.stderr)
        return 1
    usages = [usage for result in results for usage in result.result()]
    readable = demangle(sorted({usage.kernel for usage in usages}), toolkit.nvcc)
    print(report(usages, readable))
    print(f"cuda_check: {len(files)} files x {', '.join(archs)} compile with nvcc {toolkit.version}")
    most = arguments.max_spills
    spilling = sorted({short(readable[usage.kernel]) for usage in usages if usage.spills > most})
    if spilling:
        print(
            f"cuda_check: more than {most} bytes of spilled registers in {'; '.join(spilling)}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
