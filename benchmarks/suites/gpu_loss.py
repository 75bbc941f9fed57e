"""Bandwidth of the loss kernels on a GPU, against a device-to-device copy measured in the same run.

    python -m benchmarks.suites.gpu_loss [--smoke]

The loss moves memory and does little else, so the copy's bandwidth is the ceiling. Bytes a kernel must move,
for L features of N elements of s bytes (`must_move`; what else moves, such as the sums, is left out):

    forward, l1     L N s read + (L - 1) N / 2 written (packed signs)
    backward, l1    (L - 1) N / 2 read + L N s written
    forward, l2     L N s read
    backward, l2    L N s read + L N s written
    backward_at     as FeatureFlow calls it, feature by feature and onto gradients that are there: 2 L N s, and
                    (3 L - 4) N / 2 read for l1 (each plane by three features), (5 L - 6) N s for l2

Times are medians over rounds in which everything that is compared runs in turn. Large stages are far beyond
the L2 cache; small ones are in it, as they are when a training step has just made them. `graph`: replays of a
CUDA graph, without what Python and the launches cost. Tables go to $FFR_RESULTS_DIR (default:
benchmarks/results) as gpu_loss.csv and .json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ffr_ext
from ffr_ext import backends, ffr_loss, ops, reference

from ..reporting.results import RESULTS, commit, driver

Run = Callable[[], Any]


class Stage(NamedTuple):
    length: int
    numel: int


class Setting(NamedTuple):
    name: str
    stages: list[Stage]
    dtype: torch.dtype
    batch: int
    whole: bool = True  # also the whole loss against eager and torch.compile, which compiles for a while

    @property
    def gigabytes(self) -> float:
        return sum(s.length * s.numel for s in self.stages) * self.dtype.itemsize / 1e9


def large(megabytes: int, dtype: torch.dtype, length: int = 10) -> Setting:
    """One stage of so many megabytes in all."""
    numel = (megabytes << 20) // (length * dtype.itemsize) // 1024 * 1024
    return Setting(f"{length} features, {megabytes} MiB", [Stage(length, numel)], dtype, 64)


def resnet_cifar(batch: int, dtype: torch.dtype) -> Setting:
    """A ResNet on CIFAR: 10 x [16, 32, 32], 9 x [32, 16, 16], 9 x [64, 8, 8]."""
    stages = [Stage(10, batch * 16384), Stage(9, batch * 8192), Stage(9, batch * 4096)]
    return Setting(f"ResNet CIFAR, batch {batch}", stages, dtype, batch)


def settings(smoke: bool, full: bool) -> list[Setting]:
    if smoke:
        return [large(1, torch.float32), large(1, torch.float32, length=3), resnet_cifar(2, torch.bfloat16)]
    dtypes = (torch.float32, torch.bfloat16)
    result = [large(megabytes, dtype) for dtype in dtypes for megabytes in (256, 1024)]
    result += [
        large(1024, dtype, length)._replace(whole=full) for dtype in dtypes for length in (3, 4, 8, 9, 64)
    ]
    result += [resnet_cifar(batch, torch.float32) for batch in (1, 8, 32, 128, 512)]
    result += [
        resnet_cifar(batch, torch.bfloat16)._replace(whole=full or batch == 128)
        for batch in (1, 8, 32, 128, 512)
    ]
    return result


def must_move(setting: Setting, kernel: str, norm: str) -> int:
    total = 0
    for stage in setting.stages:
        length, feature = stage.length, stage.numel * setting.dtype.itemsize
        plane = (stage.numel + 31) // 32 * 16
        if kernel == "backward_at":
            read = (3 * length - 4) * plane if norm == "l1" else (5 * length - 6) * feature
            total += read + 2 * length * feature
        elif norm == "l1":
            total += length * feature + (length - 1) * plane
        else:
            total += length * feature * (1 if kernel == "forward" else 2)
    return total


# ---------------------------------------------------------------------------------------- timing


def seconds_in_turns(runs: dict[str, Run], device: str, budget: float) -> dict[str, float]:
    """Median seconds of each, over rounds in which all run once; about `budget` seconds in all."""
    for run in runs.values():
        for _ in range(3):
            run()
    started = time.perf_counter()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    while (time.perf_counter() - started < budget or len(samples[next(iter(runs))]) < 5) and (
        len(samples[next(iter(runs))]) < 200
    ):
        for name, run in runs.items():
            samples[name].append(_seconds(run, device))
    return {name: statistics.median(values) for name, values in samples.items()}


def _seconds(run: Run, device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def graphed(run: Run) -> Run:
    """Replay of a CUDA graph of `run`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


# ---------------------------------------------------------------------------------------- what is measured


def make_features(setting: Setting, device: str) -> list[Tensor]:
    """Random, never zeros: hardware is faster on zeros, and unwritten results look right."""
    return [
        torch.randn(setting.batch, stage.numel // setting.batch, device=device)
        .to(setting.dtype)
        .requires_grad_()
        for stage in setting.stages
        for _ in range(stage.length)
    ]


def kernel_runs(setting: Setting, features: list[Tensor], norm: str, backend: str) -> dict[str, Run]:
    """The ops alone, as autograd calls them."""
    forward, backward, backward_at = ops.FLOW_KERNELS[backend]
    squared = norm != "l1"
    device = features[0].device
    lengths = [s.length for s in setting.stages]
    numels = [s.numel for s in setting.stages]
    groups = [1] * len(lengths)
    entries = sum(2 * n - 3 for n in lengths)
    plane = [(s.numel + 31) // 32 * 16 for s in setting.stages]
    sign_bytes = 0 if squared else sum((n - 1) * p for n, p in zip(lengths, plane, strict=True))
    stats = torch.empty(entries, dtype=torch.float64, device=device)
    signs = torch.empty(sign_bytes, dtype=torch.uint8, device=device)
    coef = torch.rand(entries, dtype=torch.float64, device=device)
    plain = [f.detach() for f in features]
    grads = [torch.zeros_like(f) for f in plain]
    read = plain if squared else []

    def one_by_one() -> None:
        first = entry = plane_start = 0
        for stage, size in zip(setting.stages, plane, strict=True):
            length, last = stage.length, first + stage.length
            used, saved = (
                coef[entry : entry + 2 * length - 3],
                signs[plane_start : plane_start + (length - 1) * size],
            )
            for index in range(length)[::-1]:
                near = plain[first:last] if squared else []
                grad = grads[first + index]
                backward_at(near, saved, used, length, stage.numel, 1, squared, index, grad, True)
            first, entry, plane_start = last, entry + 2 * length - 3, plane_start + (length - 1) * size

    return {
        "forward": lambda: forward(plain, lengths, groups, squared, stats, signs),
        "backward": lambda: backward(read, signs, coef, lengths, numels, groups, squared, grads),
        "backward_at": one_by_one,
    }


def loss_runs(features: list[Tensor], norm: str, providers: Sequence[str]) -> dict[str, Run]:
    """Loss and all gradients."""
    # Dynamo keeps what it compiled by function, and after eight shapes runs the rest eagerly.
    torch.compiler.reset()
    compiled = torch.compile(reference.ffr_loss, dynamic=False)
    functions: dict[str, Callable[..., Tensor]] = {"eager": reference.ffr_loss, "torch.compile": compiled}
    for provider in providers:
        functions[provider] = lambda xs, norm, name=provider: ffr_loss(xs, norm=norm, backend=name)

    def both(function: Callable[..., Tensor]) -> Run:
        return lambda: torch.autograd.grad(function(features, norm=norm), features)

    return {name: both(function) for name, function in functions.items()}


def loss_error(features: list[Tensor], norm: str, provider: str) -> float:
    """Relative, against float64. Feature by feature, because float64 copies of all may not fit."""
    loss = ffr_loss([f.detach() for f in features], norm=norm, backend=provider).item()
    wide = [f.detach().cpu() for f in features] if features[0].numel() < 1 << 22 else None
    if wide is None:
        return float("nan")
    truth = reference.ffr_loss([f.double() for f in wide], norm=norm).item()
    return abs(loss - truth) / abs(truth)


def copy_bandwidth(device: str, megabytes: int) -> float:
    """Bytes read and written per second by a device-to-device copy."""
    source = torch.randn((megabytes << 20) // 4, device=device)
    target = torch.empty_like(source)
    seconds = seconds_in_turns({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"]
    return 2 * source.numel() * 4 / seconds


def run_setting(
    setting: Setting, device: str, providers: list[str], budget: float, full: bool
) -> Iterator[dict[str, Any]]:
    copy = copy_bandwidth(device, 64 if device == "cpu" else 2048)
    for norm in ("l1", "l2_squared"):
        features = make_features(setting, device)
        base = dict(
            setting=setting.name, dtype=str(setting.dtype)[6:], norm=norm, gigabytes=setting.gigabytes
        )
        runs: dict[str, Run] = {}
        for provider in providers:
            for kernel, run in kernel_runs(setting, features, norm, provider).items():
                runs[f"{provider} {kernel}"] = run
                if device == "cuda":
                    runs[f"{provider} {kernel} graph"] = graphed(run)
        for name, seconds in seconds_in_turns(runs, device, budget).items():
            provider, kernel, *graph = name.split()
            moved = must_move(setting, kernel, norm)
            yield (
                base
                | dict(what=kernel, provider=provider, graph=bool(graph), us=seconds * 1e6, bytes=moved)
                | dict(
                    gb_per_s=moved / seconds / 1e9,
                    share_of_copy=moved / seconds / copy,
                    copy_gb_per_s=copy / 1e9,
                )
            )
        del runs
        if not (setting.whole and (norm == "l1" or full or device == "cpu")):
            continue
        whole = loss_runs(features, norm, providers)
        if device == "cuda" and setting.gigabytes < 0.2:
            whole |= {f"{name} graph": graphed(run) for name, run in whole.items()}
        for name, seconds in seconds_in_turns(whole, device, budget).items():
            provider, *graph = name.split(" ")
            error = loss_error(features, norm, provider) if provider in providers else float("nan")
            yield (
                base
                | dict(what="loss and gradients", provider=provider, graph=bool(graph), us=seconds * 1e6)
                | dict(relative_error=error)
            )
        del whole, features
        if device == "cuda":
            torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------- report


def environment(device: str) -> dict[str, Any]:
    facts = dict(
        commit=commit(), ffr_ext=ffr_ext.__version__, torch=torch.__version__, cuda=torch.version.cuda
    )
    if device == "cuda":
        facts |= dict(gpu=torch.cuda.get_device_name(), driver=driver())
    facts |= {
        f"backend_{name}": status.reason for name, status in backends.available().items() if status.available
    }
    return facts


def table(rows: list[dict[str, Any]]) -> str:
    """The kernels with their share of the copy, and the whole loss with the speed-up over eager and
    torch.compile.
    """
    lines = [f"{'setting':24} {'dtype':9} {'norm':11} {'kernel':18} {'us':>9} {'GB/s':>7} {'of copy':>8}"]
    for row in (r for r in rows if "bytes" in r):
        kernel = f"{row['provider']} {row['what']}{' graph' if row['graph'] else ''}"
        lines.append(
            f"{row['setting']:24} {row['dtype']:9} {row['norm']:11} {kernel:22} {row['us']:9.1f} "
            f"{row['gb_per_s']:7.0f} {row['share_of_copy']:8.1%}"
        )
    lines += [
        "",
        f"{'loss and gradients':24} {'dtype':9} {'norm':11} {'us':>9} {'x eager':>8} {'x compile':>9}",
    ]
    losses = [r for r in rows if "bytes" not in r]
    nan = float("nan")  # of a setting that failed halfway
    times = {(r["setting"], r["dtype"], r["norm"], r["graph"], r["provider"]): r["us"] for r in losses}
    for row in losses:
        key = (row["setting"], row["dtype"], row["norm"], row["graph"])
        name = f"{row['provider']}{' graph' if row['graph'] else ''}"
        lines.append(
            f"{row['setting']:24} {row['dtype']:9} {row['norm']:11} {row['us']:9.1f} "
            f"{times.get((*key, 'eager'), nan) / row['us']:8.2f} "
            f"{times.get((*key, 'torch.compile'), nan) / row['us']:9.2f}  {name}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 1 if a setting failed, whose rows up to there are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, also without a GPU: does the script work"
    )
    parser.add_argument(
        "--full", action="store_true", help="torch.compile for every setting and norm: half an hour"
    )
    parser.add_argument("--budget", type=float, default=0.6, help="seconds per table row group")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        raise SystemExit("no CUDA device; --smoke runs tiny sizes on the CPU")
    wanted = ("cuda", "triton") if device == "cuda" else ("cpu",)
    status = backends.available()
    providers = [name for name in wanted if status[name].available]
    if not providers:
        raise SystemExit("; ".join(f"{name}: {status[name].reason}" for name in wanted))
    rows: list[dict[str, Any]] = []
    failed = 0
    directory = Path(os.environ.get("FFR_RESULTS_DIR", RESULTS))
    directory.mkdir(parents=True, exist_ok=True)
    for setting in settings(options.smoke, options.full):
        try:
            for row in run_setting(setting, device, providers, options.budget, options.full):
                rows.append(row)
        except Exception:  # out of memory, a compiler that refuses: the other settings are worth having
            traceback.print_exc()
            print(f"FAILED: {setting.name}, {setting.dtype}", flush=True)
            failed = 1
        # After every setting, so that a run that is cut off leaves what it has.
        record = dict(environment=environment(device), rows=rows)
        (directory / "gpu_loss.json").write_text(json.dumps(record, indent=1))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (directory / "gpu_loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(json.dumps(environment(device), indent=1))
    print(table(rows))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
