"""What a method costs and what it saves on this machine: measured when the report is made, not while others train."""

from __future__ import annotations

import copy
import random
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .methods import none
from .training import Run, Settings, Split, step

STEPS, ROUNDS = 30, 50


def cost_of(settings: Settings, split: Split) -> dict[str, float]:
    """Added time of a training step, as a share of the step without, and the most memory that the process held.

    Both variants take steps in turns, from copies of one network.
    """
    run = Run(settings, split)
    variants = {True: _variant(run, run.method.make)}
    x, y = (part[: settings.batch_size] for part in split.train)
    for _ in range(3):
        step(*variants[True], x, y)
    memory = peak_memory_mib()
    variants[False] = _variant(run, none)
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * (STEPS + 2)):
        with_penalty = bool((turn + turn // 2) % 2)  # A B B A ...: neither always goes first
        begin = time.perf_counter()
        step(*variants[with_penalty], x, y)
        if turn >= 4:
            times[with_penalty].append(time.perf_counter() - begin)
    return {"added_time": median(times[True]) / median(times[False]) - 1, "peak_memory_mib": memory}


def peak_memory_mib() -> float:
    """The most that this process held. `ru_maxrss` counts what the parent held before it became another program."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _variant(run: Run, make: Any) -> tuple[nn.Module, torch.optim.Optimizer, list[Any]]:
    model = copy.deepcopy(run.model).train()
    regularizers = make(model, run.example, run.settings.strength)
    for regularizer in regularizers:
        regularizer.attach()
    return model, torch.optim.SGD(model.parameters(), lr=0.0), regularizers


@torch.no_grad()
def latencies(models: Mapping[Any, nn.Module], images: Tensor) -> dict[Any, float]:
    """Seconds of the fastest of many forward passes of each, in turns, each round in another order.

    The fastest, because whatever else the machine does makes a pass slower and none makes it faster.
    """
    times: dict[Any, list[float]] = {name: [] for name in models}
    order, shuffle = list(models), random.Random(0)
    for model in models.values():
        model.eval()(images)
    for _ in range(ROUNDS):
        shuffle.shuffle(order)
        for name in order:
            begin = time.perf_counter()
            models[name](images)
            times[name].append(time.perf_counter() - begin)
    return {name: min(taken) for name, taken in times.items()}
