"""Counted work against committed budgets: a guard that does not depend on how fast or how busy a machine is.

`python -m benchmarks.budgets` prints what is counted beside `budgets.json`. `--write` takes over what is
lower and what is new; raising a budget needs `--reason "why"`, which is kept in the file and belongs into
the commit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffr_ext import FeatureFlow, backends, compact_filters, ffr_loss, filter_norms
from ffr_ext.regularizers.fused import add_scaled_, row_column_norms, shrink_

from .harness import networks
from .harness.measure import memory_timeline, profiled
from .harness.shapes import SETTINGS, make_features
from .reporting.results import ROOT

FILE = Path(__file__).resolve().parent / "budgets.json"
Counts = dict[str, int]

# Per cent that a count may be above its budget. Bytes and launches are the same everywhere; ops and Python
# calls change a little with the versions of torch and Python, instructions with the compiler.
TOLERANCE = {
    "bytes": 1,
    "kernels": 0,
    "ops": 15,
    "python_calls": 25,
    "instructions": 15,
    "reads": 15,
    "writes": 15,
}
# A budget far above what is used guards nothing: further below than this it has to be lowered.
SLACK = {
    "bytes": 5,
    "kernels": 0,
    "ops": 30,
    "python_calls": 40,
    "instructions": 30,
    "reads": 30,
    "writes": 30,
}


# --------------------------------------------------------------------------------------------------
# Counting in this process
# --------------------------------------------------------------------------------------------------


def _python_calls(run: Callable[[], Any]) -> int:
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def count_run(run: Callable[[], Any], device: str) -> Counts:
    """What one run allocates and calls. `kernels`: our ops on a CPU, launches of any kernel on a GPU."""
    events = profiled(run, device)
    ops = [e for e in events if e.get("cat") == "cpu_op"]
    launches = [e for e in events if e.get("cat") == "kernel"]
    ours = [e for e in ops if e["name"].startswith("ffr_ext::")]
    return {
        "bytes": memory_timeline(run, device).allocated,
        "kernels": len(launches) if device == "cuda" else len(ours),
        "ops": len(ops),
        "python_calls": _python_calls(run),
    }


LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny2": ("tiny2", {}),
    "tiny3": ("tiny3", {}),
    "resnet20": ("resnet20", {}),
    "resnet110": ("resnet110", {}),
    "resnet20/l2_squared": ("resnet20", {"norm": "l2_squared"}),
    "resnet20/l2": ("resnet20", {"norm": "l2"}),
    "resnet20/angle": ("resnet20", {"curvature_kind": "angle"}),
    "resnet20/bfloat16/channels_last": ("resnet20", {}),
}


def count_loss(name: str, backend: str) -> dict[str, Counts]:
    """Forward and backward of `ffr_loss`, batch 2."""
    setting, options = LOSSES[name]
    device = "cpu" if backend == "cpu" else "cuda"
    low = "bfloat16" in name
    features = make_features(
        SETTINGS[setting].shapes(2),
        dtype=torch.bfloat16 if low else torch.float32,
        layout="channels_last" if low else "contiguous",
        device=device,
    )
    held: list[Tensor] = []

    def forward() -> Tensor:
        return ffr_loss(features, backend=backend, **options)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(held[0], features, retain_graph=True)

    for _ in range(2):  # what is made once: weights, plans, compiled kernels
        held[:] = [forward()]
        backward()
    prefix = f"{backend}/{name}"
    return {
        f"{prefix}/forward": count_run(forward, device),
        f"{prefix}/backward": count_run(backward, device),
    }


def count_flow(backend: str) -> dict[str, Counts]:
    """What FeatureFlow adds to the forward and backward pass of a small ResNet."""
    device = "cpu" if backend == "cpu" else "cuda"
    counts: list[Counts] = []
    for penalised in (False, True):
        torch.manual_seed(0)
        model = networks.cifar_resnet(8).to(device)
        x, _ = networks.images(2, 16, 10, device)
        flow = FeatureFlow(model, model.flow_layers, backend=backend)
        if penalised:
            flow.attach()

        def step(model: torch.nn.Module = model, x: Tensor = x, flow: FeatureFlow = flow) -> None:
            loss = model(x).sum()
            if flow.attached:
                loss = loss + flow.loss()
            loss.backward()
            model.zero_grad(set_to_none=True)

        step()
        step()
        counts.append(count_run(step, device))
        flow.detach()
    plain, penalised_counts = counts
    return {f"{backend}/FeatureFlow/step": {key: penalised_counts[key] - plain[key] for key in plain}}


def count_filters(backend: str) -> dict[str, Counts]:
    """Norms, gather and scaling of the weights and vectors of a small ResNet: what a list of many tensors costs."""
    device = "cpu" if backend == "cpu" else "cuda"
    tensors = [t for t in networks.cifar_resnet(20).to(device).state_dict().values() if t.dim() > 0]
    keep = [torch.arange(0, t.shape[0], 2, device=device) for t in tensors]
    wide = [t for t in tensors if t.dim() > 1]
    grads = [torch.zeros_like(t) for t in wide]
    rows, columns = ([torch.ones(t.shape[d], device=device) for t in wide] for d in (0, 1))
    runs: dict[str, Callable[[], Any]] = {
        "filter_norms": lambda: filter_norms(tensors, backend=backend),
        "compact_filters": lambda: compact_filters(tensors, keep, backend=backend),
        "row_column_norms": lambda: row_column_norms(wide, backend=backend),
        "add_scaled_": lambda: add_scaled_(grads, wide, rows, columns, backend=backend),
        "shrink_": lambda: shrink_(grads, rows, columns, backend=backend),
    }
    for run in runs.values():
        run()
    return {f"{backend}/{name}/resnet20": count_run(run, device) for name, run in runs.items()}


def count_here() -> dict[str, Counts]:
    """Everything that can be counted in this process."""
    found: dict[str, Counts] = {}
    for backend in ("cpu", "cuda", "triton"):
        if backends.available()[backend].available and (backend == "cpu" or torch.cuda.is_available()):
            for name in LOSSES:
                found.update(count_loss(name, backend))
            found.update(count_flow(backend))
            found.update(count_filters(backend))
    return found


# --------------------------------------------------------------------------------------------------
# Counting instructions
# --------------------------------------------------------------------------------------------------

NATIVE_LENGTH, NATIVE_FILTERS, NATIVE_NUMEL, NATIVE_ROWS = 5, 64, 8192, 8
NATIVE = [
    (kernel, dtype)
    for kernel in ("forward", "forward_signs", "forward_squared", "backward", "backward_squared")
    for dtype in ("float32", "bfloat16")
] + [(kernel, "float32") for kernel in ("norms", "norms_of_columns", "norms_of_biases")]
GROUPS = {"norms_of_both": "row_column_norms", "add_scaled": "add_scaled", "shrink": "shrink"}
NATIVE += [(kernel, "float32") for kernel in GROUPS]


def missing_for_native() -> str | None:
    """Why instructions cannot be counted here, or None."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    return None if _compiler() else "no C++ compiler is installed"


def _compiler() -> str | None:
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def compiler_version() -> str:
    """Name and major version: another one makes other instructions of the same source."""
    program = str(_compiler())
    text = subprocess.run([program, "-dumpversion"], check=True, capture_output=True, text=True).stdout
    first = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    return f"{'clang' if 'clang' in first else 'gcc'} {text.strip().split('.')[0]}"


def build_native(directory: Path) -> Path:
    """The programs of native/ in `directory`, with the flags of CMakeLists.txt."""
    flags = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]

    def compile_(*arguments: str) -> None:
        subprocess.run([str(_compiler()), *flags, *arguments], check=True, cwd=directory)

    compile_("-c", *map(str, sorted((ROOT / "csrc/cpu").rglob("*.cpp"))))
    objects = [str(path) for path in directory.glob("*.o")]
    for source in (ROOT / "benchmarks/native").glob("*.cpp"):
        compile_(str(source), *objects, "-o", source.stem)
    return directory


def count_native(programs: Path, kernel: str, dtype: str, isa: str) -> Counts | None:
    """Instructions, loads and stores inside the kernel, or None if this machine has no such instruction set.

    Valgrind knows no AVX-512 and hides it from the program.
    """
    program, entry, count = "count_flow", f"flow_{kernel.split('_')[0]}", NATIVE_LENGTH
    if kernel in GROUPS:
        program, entry, count = "count_groups", GROUPS[kernel], NATIVE_ROWS
    elif kernel.startswith("norms"):
        program, entry, count = "count_norms", "filter_norms", NATIVE_FILTERS
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "out"
        command = ["valgrind", "--tool=callgrind", "--cache-sim=yes", f"--toggle-collect=ffr::{entry}*"]
        command += [
            f"--callgrind-out-file={output}",
            str(programs / program),
        ]
        command += [
            kernel,
            dtype,
            str(count),
            str(NATIVE_NUMEL),
        ]
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            env={"FFR_EXT_CPU_ISA": isa, "PATH": "/usr/bin:/bin"},
        )
        if done.stdout.strip() != isa:
            return None
        lines = output.read_text().splitlines()
    events = next(line for line in lines if line.startswith("events:")).split()[1:]
    totals = next(line for line in lines if line.startswith(("totals:", "summary:"))).split()[1:]
    found = dict(zip(events, map(int, totals), strict=False))
    return {"instructions": found["Ir"], "reads": found["Dr"], "writes": found["Dw"]}


def count_all_native() -> dict[str, Counts]:
    """Every kernel with every instruction set that valgrind runs here."""
    found: dict[str, Counts] = {}
    with tempfile.TemporaryDirectory() as directory:
        programs = build_native(Path(directory))
        for isa in ("default", "avx2"):
            for kernel, dtype in NATIVE:
                counts = count_native(programs, kernel, dtype, isa)
                if counts is not None:
                    found[native_name(kernel, dtype, isa)] = counts
    return found


def native_name(kernel: str, dtype: str, isa: str) -> str:
    """The name of a native count in the file."""
    return f"native/{kernel}/{dtype}/{isa}"


# --------------------------------------------------------------------------------------------------
# The file
# --------------------------------------------------------------------------------------------------


def load() -> dict[str, Any]:
    """The committed budgets: {"budgets": {name: {count: number}}, "raised": [reasons]}."""
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def problems(name: str, counted: Mapping[str, int], budget: Mapping[str, int]) -> list[str]:
    """A sentence for every count that is above its budget, or so far below that the budget should follow."""
    found = []
    for key, limit in budget.items():
        got = counted[key]
        if got > limit * (1 + TOLERANCE[key] / 100):
            found.append(f"{name}: {got} {key}, the budget is {limit} (+{TOLERANCE[key]} %)")
        elif got < limit * (1 - SLACK[key] / 100):
            found.append(
                f"{name}: {got} {key}, far below the budget of {limit}: lower it (see benchmarks/budgets.py)"
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print counts and budgets; write them if asked to."""
    parser = argparse.ArgumentParser("python -m benchmarks.budgets", description=__doc__)
    parser.add_argument("--write", action="store_true", help="take over what is lower or new")
    parser.add_argument("--reason", help="why what is higher may be: written into the file")
    options = parser.parse_args(arguments)
    content = load() if FILE.exists() else {"budgets": {}, "raised": []}
    budgets: dict[str, Counts] = content["budgets"]
    counted = count_here()
    missing = missing_for_native()
    if missing:
        print(f"no instruction counts: {missing}")
    else:
        counted.update(count_all_native())
        content.setdefault("compiler", compiler_version())
        if content["compiler"] != compiler_version():
            print(f"the native budgets are those of {content['compiler']}, this is {compiler_version()}")
    raised = []
    for name, counts in counted.items():
        for key, got in counts.items():
            limit = budgets.get(name, {}).get(key)
            print(f"{name:46s} {key:13s} {got:10d}  budget {'none' if limit is None else limit}")
            if limit is None or got < limit or (got > limit and options.reason):
                if limit is not None and got > limit:
                    raised.append(f"{name} {key} {limit} -> {got}")
                budgets.setdefault(name, {})[key] = got
            elif got > limit * (1 + TOLERANCE[key] / 100):
                print("  above the budget; raising it needs --reason")
    if options.write:
        if raised:
            content["raised"].append({"reason": options.reason, "what": raised})
        FILE.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
