"""A training step under torch.compile (forward, loss, backward, optimizer), without the penalty and with it.

What somebody who compiles pays. `formula` is the penalty written in Python inside the compiled step, `ffr_loss` the
same call of this package, `FeatureFlow` the attached hooks with the model compiled and the loss taken outside. Rounds
run one step of each provider in random order; the added time is the median over rounds of the ratio to the plain step.
`first_step_seconds` is the first step, with everything compiled anew.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.utils import fresh_inductor_cache

from ffr_ext import FeatureFlow, ffr_loss, reference

from ..harness import networks
from ..harness.measure import Effort, Options, Row, summarise
from . import step
from .step import PLAIN, TINY, WEIGHT, StepCase


def cases(device: torch.device | str) -> list[StepCase]:
    """Those of the eager step, and a ViT on images of CIFAR's size."""
    vit = StepCase("vit-tiny", 32, 32, networks.vit_tiny, 10)
    return [*step.cases(device), vit]


PROVIDERS = (PLAIN, "formula", "ffr_loss", "FeatureFlow")


def _penalty(loss: Callable[..., Tensor]) -> Callable[[list[Tensor]], Tensor]:
    return lambda features: loss(features, gradient=WEIGHT, curvature=WEIGHT)


PENALTIES = {"formula": _penalty(reference.ffr_loss), "ffr_loss": _penalty(ffr_loss)}


class CompiledStep:
    """One training step; each provider has a network, an optimizer and a compiled graph of its own."""

    def __init__(self, case: StepCase, provider: str, device: torch.device | str) -> None:
        torch.manual_seed(0)
        self.model = case.build().to(device)
        self.x, self.y = networks.images(case.batch, case.image, case.classes, device)
        if case.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self.x = self.x.to(memory_format=torch.channels_last)
        self.case, self.device = case, torch.device(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.flow: FeatureFlow | None = None
        if provider == "FeatureFlow":
            self.flow = FeatureFlow(
                self.model, self.model.flow_layers, gradient=WEIGHT, curvature=WEIGHT
            ).attach()
            self.logits = torch.compile(self.model, fullgraph=True, dynamic=False)
        else:
            self.loss = torch.compile(
                _loss_of(self.model, PENALTIES.get(provider)), fullgraph=True, dynamic=False
            )

    def run(self) -> None:
        """Forward, loss, backward, optimizer."""
        with torch.autocast(self.device.type, self.case.autocast, enabled=self.case.autocast is not None):
            loss = (
                self.loss(self.x, self.y)
                if self.flow is None
                else F.cross_entropy(self.logits(self.x), self.y)
            )
        if self.flow is not None:
            loss = loss + self.flow.loss()
        loss.backward()
        self.optimizer.step()

    def timed(self) -> float:
        """Milliseconds of one step; gradients of the last one are dropped before."""
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        start = time.perf_counter_ns()
        self.run()
        self._wait()
        return (time.perf_counter_ns() - start) / 1e6

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _loss_of(
    model: networks.Network, penalty: Callable[[list[Tensor]], Tensor] | None
) -> Callable[[Tensor, Tensor], Tensor]:
    def plain(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y)

    def penalised(x: Tensor, y: Tensor) -> Tensor:
        assert penalty is not None
        features: list[Tensor] = []
        return F.cross_entropy(model(x, features), y) + penalty(features)

    return plain if penalty is None else penalised


def run_case(
    case: StepCase, providers: Sequence[str], device: torch.device | str, effort: Effort | None = None
) -> list[Row]:
    """One row per provider; the plain step is always among them."""
    rounds = 31 if effort is None else effort.rounds
    names = [PLAIN, *(name for name in providers if name != PLAIN)]
    order, shuffle = list(names), random.Random(0).shuffle
    shuffle(order)
    _import_the_compiler(device)
    torch.compiler.reset()
    steps, compile_seconds = {}, {}
    for name in order:
        steps[name] = CompiledStep(case, name, device)
        compile_seconds[name] = _first_step(steps[name])
        steps[name].timed()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            times[name].append(steps[name].timed())
    return [_row(case, name, device, times[name], times[PLAIN], compile_seconds[name]) for name in names]


@functools.cache
def _import_the_compiler(device: torch.device | str) -> None:
    """What the first compilation of a process imports takes seconds."""
    for name in PROVIDERS:
        _first_step(CompiledStep(TINY[0], name, device))


def _first_step(step: CompiledStep) -> float:
    """Seconds of it, with no kernel in any cache, not even one that another provider's graph has too."""
    with fresh_inductor_cache():
        return step.timed() / 1e3


def _row(
    case: StepCase,
    name: str,
    device: torch.device | str,
    times: list[float],
    plain: list[float],
    compile_seconds: float,
) -> Row:
    timing = summarise([(t, t) for t in times])
    ratios = [t / p for t, p in zip(times, plain, strict=True)]
    config: dict[str, Any] = {
        "network": case.network,
        "batch": case.batch,
        "dtype": "float32" if case.autocast is None else str(case.autocast).removeprefix("torch."),
        "layout": "channels_last" if case.channels_last else "contiguous",
        "added_time_percent": 100 * (statistics.median(ratios) - 1),
        "first_step_seconds": compile_seconds,
    }
    return Row(
        bench="step-compiled",
        case=case.name,
        provider=name,
        mode="step",
        device=torch.device(device).type,
        ms=timing.median,
        ms_p20=timing.p20,
        ms_p80=timing.p80,
        host_ms=timing.host,
        samples=timing.samples,
        bytes=0,
        gbps=0.0,
        copy_percent=None,
        peak_bytes=None,
        allocated_bytes=None,
        error=None,
        config=config,
    )


def main(options: Options) -> list[Row]:
    """Measure, reporting each network as it is done."""
    rows: list[Row] = []
    for case in TINY if options.tiny else cases(options.device):
        if not options.wants("only", case.network):
            continue
        chosen = [name for name in PROVIDERS if options.wants("providers", name)]
        got = run_case(case, chosen, options.device, options.effort)
        options.report(got)
        rows += got
    return rows
