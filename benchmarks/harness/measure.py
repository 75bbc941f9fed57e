"""Time, memory and correctness of several providers of one computation, from one definition.

A benchmark builds one `Subject` per provider (eager, torch.compile, ours, ...) from the same inputs and
hands them to `measure`. All of them are timed in one run, in turns, so that a machine that slows down slows
all of them; the row of a provider says how long it took, what it allocated and how far its outputs are from
the truth, so that these cannot drift apart. A copy is timed among them: the bandwidth at which the bytes of
the formula are moved is given in per cent of the copy's.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

COPY = "copy"  # the provider that `measure` adds


def _nothing() -> None:
    pass


@dataclass
class Subject:
    """One provider with its inputs, ready to run."""

    run: Callable[[], Any]  # what is timed; what it returns is dropped before the next run
    prepare: Callable[[], Any] = _nothing  # before every run, not timed
    error: Callable[[], float] | None = None  # runs the provider and compares with the truth


@dataclass(frozen=True)
class Effort:
    """How long to measure. Rounds go on until both `rounds` and `seconds` are reached, or `most_seconds`
    have passed.
    """

    warmup: int = 3
    rounds: int = 15
    seconds: float = 0.3  # per provider
    most_seconds: float = 8.0  # per provider
    sample_seconds: float = (
        5e-4  # shorter runs are timed several at a time, where nothing has to be prepared between
    )
    memory: bool = True


QUICK = Effort(
    warmup=1, rounds=2, seconds=0.0, sample_seconds=0.0
)  # smoke tests: everything runs, nothing is believed


def _drop(rows: list[Row]) -> None:
    pass


@dataclass(frozen=True)
class Options:
    """What to run: the arguments of every benchmark's `main`. Empty selections mean everything."""

    device: torch.device | str = "cpu"
    only: Sequence[str] = ()  # names of settings
    providers: Sequence[str] = ()
    modes: Sequence[str] = ()
    effort: Effort | None = None  # None: what the benchmark finds right
    tiny: bool = False  # small stand-ins with the same structure, for smoke tests
    report: Callable[[list[Row]], None] = _drop  # called with the rows of each case as soon as it is done

    def wants(self, kind: str, name: str) -> bool:
        """Whether `name` is selected by `only`, `providers` or `modes` (the `kind`)."""
        chosen: Sequence[str] = getattr(self, kind)
        return not chosen or name in chosen


@dataclass
class Row:
    """One measurement. Times in milliseconds, memory in bytes."""

    bench: str
    case: str
    provider: str
    mode: str
    device: str
    ms: float  # median
    ms_p20: float
    ms_p80: float
    host_ms: float  # time until the call returned; on a CPU the same as ms
    samples: int
    bytes: int  # that have to move, by the formula
    gbps: float  # bytes / ms
    copy_percent: float | None  # of the bandwidth of a copy in the same run
    peak_bytes: int | None  # most memory held at once above what was held before the run
    allocated_bytes: int | None  # sum of all allocations of a run
    error: float | None  # relative distance of the outputs from the float64 truth
    config: dict[str, Any]  # dtype, layout, norm, shapes ...


class Timing(NamedTuple):
    median: float
    p20: float
    p80: float
    host: float
    samples: int
    times: tuple[float, ...]  # of every round, in order, so that providers can be compared round by round


def measure(
    bench: str,
    case: str,
    mode: str,
    build: Mapping[str, Callable[[int], Subject]],
    *,
    device: torch.device | str,
    moved_bytes: int,
    input_bytes: int,
    config: Mapping[str, Any],
    effort: Effort | None = None,
    with_copy: bool = True,
    copy: Callable[[int], Subject] | None = None,
    copy_bytes: int = 0,
) -> list[Row]:
    """One row per provider. `build[provider](copy)` makes the subject on the inputs number `copy`.

    `moved_bytes`: what has to be read and written by the formula. `input_bytes`: what one set of inputs
    takes; on a GPU as many sets take turns as are needed to find none of them in the cache. The copy that
    bandwidth is compared with reads and writes `moved_bytes` in memory that is there; `copy` is another
    one, of `copy_bytes`.
    """
    effort = effort or Effort()
    device = torch.device(device)
    copies = cold_copies(input_bytes, device)
    subjects = {name: [make(i) for i in range(copies)] for name, make in build.items()}
    if with_copy:
        copy_bytes = copy_bytes if copy else moved_bytes
        make_copy = copy or (lambda _: _copy_subject(moved_bytes, device))
        subjects[COPY] = [make_copy(i) for i in range(copies)]
    timings = time_in_turns(subjects, device, effort)
    rows = []
    for name, versions in subjects.items():
        timing, subject = timings[name], versions[0]
        moved = copy_bytes if name == COPY else moved_bytes
        gbps = moved / timing.median / 1e6 if timing.median else 0.0
        roof = copy_bytes / timings[COPY].median / 1e6 if with_copy and timings[COPY].median else 0.0
        held = peak_memory(subject, device) if effort.memory and name != COPY else None
        rows.append(
            Row(
                bench=bench,
                case=case,
                provider=name,
                mode=mode,
                device=device.type,
                ms=timing.median,
                ms_p20=timing.p20,
                ms_p80=timing.p80,
                host_ms=timing.host,
                samples=timing.samples,
                bytes=moved,
                gbps=gbps,
                copy_percent=100 * gbps / roof if roof else None,
                peak_bytes=held.peak if held else None,
                allocated_bytes=held.allocated if held else None,
                error=subject.error() if subject.error else None,
                config=dict(config),
            )
        )
    return rows


# --------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------


def time_in_turns(
    subjects: Mapping[str, Sequence[Subject]], device: torch.device, effort: Effort
) -> dict[str, Timing]:
    """Milliseconds per run of every provider. Each round times each of them once, in an order that
    changes.
    """
    clock = _cuda_sample if device.type == "cuda" else _cpu_sample
    inner = {}
    for name, versions in subjects.items():
        for i in range(max(effort.warmup, len(versions))):
            versions[i % len(versions)].prepare()
            versions[i % len(versions)].run()
        single = min(clock(versions[0], 1)[1] for _ in range(max(effort.warmup, 1)))
        alone = versions[0].prepare is _nothing and len(versions) == 1
        inner[name] = (
            max(1, min(1000, round(effort.sample_seconds * 1e3 / max(single, 1e-4)))) if alone else 1
        )
    names = list(subjects)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    start, done = time.perf_counter(), 0
    # No garbage collection inside a run: it would hit whichever provider is running.
    gc.collect()
    gc.disable()
    try:
        while True:
            for name in names[done % len(names) :] + names[: done % len(names)]:
                versions = subjects[name]
                samples[name].append(clock(versions[done % len(versions)], inner[name]))
            done += 1
            passed = (time.perf_counter() - start) / len(names)
            if (done >= effort.rounds and passed >= effort.seconds) or (
                passed >= effort.most_seconds and done >= 3
            ):
                break
    finally:
        gc.enable()
    return {name: summarise(taken) for name, taken in samples.items()}


def summarise(samples: Sequence[tuple[float, float]]) -> Timing:
    """Median, 20th and 80th percentile of the first of each pair, and the median of the second."""
    times = sorted(t for t, _ in samples)
    pick = lambda q: times[min(len(times) - 1, round(q * (len(times) - 1)))]  # noqa: E731
    host = statistics.median(h for _, h in samples)
    in_order = tuple(t for t, _ in samples)
    return Timing(statistics.median(times), pick(0.2), pick(0.8), host, len(times), in_order)


def _cpu_sample(subject: Subject, inner: int) -> tuple[float, float]:
    subject.prepare()
    run = subject.run
    start = time.perf_counter_ns()
    for _ in range(inner):
        run()
    passed = (time.perf_counter_ns() - start) / inner / 1e6
    return passed, passed


_GPU_CYCLES_PER_MS = 2_000_000  # at up to 2 GHz; only the length of the head start depends on it


def _cuda_sample(subject: Subject, inner: int) -> tuple[float, float]:
    """Time on the device between two events, and time until the host is free again.

    The device first idles for as long as the host needs, so that the launches are queued when it starts:
    the first number is what the kernels cost in a training step, where the host runs ahead, and the second
    is what the host pays.
    """
    subject.prepare()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    head_start = getattr(subject, "_host_ms", 0.05)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(1.5 * head_start * inner * _GPU_CYCLES_PER_MS))
    begin.record()
    start = time.perf_counter_ns()
    for _ in range(inner):
        subject.run()
    host = (time.perf_counter_ns() - start) / inner / 1e6
    end.record()
    torch.cuda.synchronize()
    subject._host_ms = min(host, 20.0)  # type: ignore[attr-defined]
    return begin.elapsed_time(end) / inner, host


def cold_copies(input_bytes: int, device: torch.device) -> int:
    """How many sets of inputs must take turns so that none is in a GPU's cache when its turn comes."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return int(min(64, max(1, -(-3 * cache // max(input_bytes, 1)))))


def _copy_subject(moved_bytes: int, device: torch.device) -> Subject:
    """Reads half of `moved_bytes` and writes the other half."""
    source = torch.ones(max(moved_bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Subject(lambda: target.copy_(source))


# --------------------------------------------------------------------------------------------------
# Memory
# --------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    peak: int  # most bytes held at once above the start
    allocated: int  # sum of all allocations
    timeline: list[tuple[float, int]]  # (milliseconds since the first allocation, bytes held)


def peak_memory(subject: Subject, device: torch.device) -> Memory:
    """What one run allocates. On a CPU from the profiler's record, on a GPU from the allocator's counters."""
    subject.prepare()
    if device.type != "cuda":
        return memory_timeline(subject.run, device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    total = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"]
    torch.cuda.reset_peak_memory_stats(device)
    kept = subject.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device) - before
    allocated = torch.cuda.memory_stats(device)["allocated_bytes.all.allocated"] - total
    del kept
    return Memory(peak, allocated, [])


def memory_timeline(run: Callable[[], Any], device: torch.device | str) -> Memory:
    """Every allocation and release of one run on `device`, from torch's profiler.

    Memory that was allocated before does not count when it is released.
    """
    device = torch.device(device)
    held, peak, allocated = 0, 0, 0
    timeline: list[tuple[float, int]] = []
    for when, change in _memory_events(run, device):
        held += change
        peak = max(peak, held)
        allocated += max(change, 0)
        timeline.append((when, held))
    return Memory(peak, allocated, timeline)


def _memory_events(run: Callable[[], Any], device: torch.device) -> list[tuple[float, int]]:
    events = [
        (float(e["ts"]), e["args"])
        for e in profiled(run, device, memory=True)
        if e.get("name") == "[memory]" and (e["args"]["Device Type"] == 1) == (device.type == "cuda")
    ]
    events.sort(key=lambda pair: (pair[0], pair[1].get("Ev Idx", 0)))
    first = events[0][0] if events else 0.0
    known: set[int] = set()
    changes = []
    for when, args in events:
        address, change = args["Addr"], args["Bytes"]
        if change > 0:
            known.add(address)
        elif address not in known:
            continue  # allocated before the run
        else:
            known.discard(address)
        changes.append(((when - first) / 1e3, change))
    return changes


def profiled(
    run: Callable[[], Any], device: torch.device | str, *, memory: bool = False
) -> list[dict[str, Any]]:
    """One run under torch's profiler, as the events of its trace. What the run returns lives until it
    ends.
    """
    activities = [ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=memory) as record:
        kept = run()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
    del kept
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        record.export_chrome_trace(file.name)
        with open(file.name, encoding="utf-8", errors="replace") as text:
            events: list[dict[str, Any]] = json.load(text)["traceEvents"]
    return events


# --------------------------------------------------------------------------------------------------
# Correctness
# --------------------------------------------------------------------------------------------------


def relative_error(outputs: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Largest ||out - truth|| / ||truth|| over the outputs; NaN if one of them has a NaN."""
    worst = 0.0
    for out, expected in zip(outputs, truth, strict=True):
        wanted = expected.double()
        distance = (out.detach().double() - wanted).norm().item()
        error = distance / max(wanted.norm().item(), 1e-300)
        worst = error if error != error or error > worst else worst
    return worst


def as_dict(row: Row) -> dict[str, Any]:
    """A row with its configuration flattened, as it is written."""
    flat = asdict(row)
    flat.update(flat.pop("config"))
    return flat
