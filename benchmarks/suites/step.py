"""A whole training step (forward, loss, backward, optimizer) without the penalty and with it, by every
provider.

What the user pays: added time and added peak memory in per cent of the plain step. Every round runs one
step of each provider, and the added time is the median over rounds of the ratio to the plain step of the
same round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ffr_ext import FeatureFlow, ffr_loss, reference

from ..harness import networks
from ..harness.measure import Effort, Options, Row, Subject, memory_timeline, peak_memory, time_in_turns

PLAIN = "none"
WEIGHT = 1e-2  # of both terms; its value makes no difference to the time


@dataclass(frozen=True)
class StepCase:
    """A network and how it is trained."""

    network: str
    batch: int
    image: int
    build: Callable[[], networks.Network]
    classes: int
    autocast: torch.dtype | None = None
    channels_last: bool = False

    @property
    def name(self) -> str:
        """Network, batch, dtype and layout."""
        dtype = "" if self.autocast is None else "/" + str(self.autocast).removeprefix("torch.")
        return f"{self.network}x{self.batch}{dtype}{'/channels_last' if self.channels_last else ''}"


def cases(device: torch.device | str) -> list[StepCase]:
    """ResNet-56 on CIFAR, and on a GPU ResNet-50 on ImageNet, the case that the goal is set for."""
    if torch.device(device).type == "cuda":
        return [
            StepCase("resnet56", 128, 32, partial(networks.cifar_resnet, 56), 10),
            StepCase("resnet50", 256, 224, networks.resnet50, 1000, torch.bfloat16, channels_last=True),
        ]
    return [
        StepCase(f"resnet{depth}", 32, 32, partial(networks.cifar_resnet, depth), 10) for depth in (20, 56)
    ]


TINY = (StepCase("resnet8", 2, 8, partial(networks.cifar_resnet, 8), 10),)


class Step:
    """One training step; each provider has a network and an optimizer of its own, from the same start."""

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
        self.penalty: Callable[[list[Tensor]], Tensor] | None = None
        if provider == "FeatureFlow":
            self.flow = FeatureFlow(
                self.model, self.model.flow_layers, gradient=WEIGHT, curvature=WEIGHT
            ).attach()
        elif provider != PLAIN:
            self.penalty = PENALTIES[provider]()

    def run(self) -> float | None:
        """Forward, loss, backward, optimizer."""
        features: list[Tensor] | None = None if self.penalty is None else []
        with torch.autocast(self.device.type, self.case.autocast, enabled=self.case.autocast is not None):
            logits = self.model(self.x, features)
            loss = F.cross_entropy(logits, self.y)
        if self.flow is not None:
            loss = loss + self.flow.loss()
        elif self.penalty is not None and features is not None:
            loss = loss + self.penalty(features)
        del features
        loss.backward()
        self.optimizer.step()
        return None

    def prepare(self) -> None:
        """Outside the measured time: gradients of the last step are dropped."""
        self.optimizer.zero_grad(set_to_none=True)

    def features(self) -> list[Tensor]:
        """The features of one forward, to know their bytes."""
        features: list[Tensor] = []
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, self.case.autocast, enabled=self.case.autocast is not None),
        ):
            self.model(self.x, features)
        return features


def _weighted(loss: Callable[..., Tensor]) -> Callable[[list[Tensor]], Tensor]:
    return lambda features: loss(features, gradient=WEIGHT, curvature=WEIGHT)


PENALTIES: dict[str, Callable[[], Callable[[list[Tensor]], Tensor]]] = {
    "eager": lambda: _weighted(reference.ffr_loss),
    "compile": lambda: torch.compile(_weighted(reference.ffr_loss), dynamic=False, fullgraph=True),
    "ffr_loss": lambda: _weighted(ffr_loss),
}
PROVIDERS = (PLAIN, *PENALTIES, "FeatureFlow")


def run_case(
    case: StepCase,
    providers: Sequence[str],
    device: torch.device | str,
    effort: Effort | None = None,
    timelines: bool = True,
) -> list[Row]:
    """One row per provider; the plain step is always among them."""
    effort = effort or Effort(rounds=9, seconds=2.0, most_seconds=20.0)
    device = torch.device(device)
    torch.compiler.reset()
    names = [PLAIN, *(name for name in providers if name != PLAIN)]
    steps = {name: Step(case, name, device) for name in names}
    features = steps[PLAIN].features()
    feature_bytes = sum(f.numel() * f.element_size() for f in features)
    count, dtype = len(features), str(features[0].dtype).removeprefix("torch.")
    del features
    subjects = {name: Subject(step.run, step.prepare) for name, step in steps.items()}
    timings = time_in_turns({name: [subject] for name, subject in subjects.items()}, device, effort)
    rows = []
    plain_peak = 0
    for name in names:
        memory = peak_memory(subjects[name], device)
        plain_peak = plain_peak or memory.peak
        ratio = statistics.median(
            t / p for t, p in zip(timings[name].times, timings[PLAIN].times, strict=True)
        )
        config: dict[str, Any] = {
            "network": case.network,
            "batch": case.batch,
            "features": count,
            "feature_bytes": feature_bytes,
            "dtype": dtype,
            "layout": "channels_last" if case.channels_last else "contiguous",
            "added_time_percent": 100 * (ratio - 1),
            "added_peak_percent": 100 * (memory.peak / plain_peak - 1),
            "added_peak_of_features_percent": 100 * (memory.peak - plain_peak) / feature_bytes,
        }
        if timelines:
            config["timeline"] = _thin(_timeline(subjects[name], memory.timeline, device))
        timing = timings[name]
        rows.append(
            Row(
                bench="step",
                case=case.name,
                provider=name,
                mode="step",
                device=device.type,
                ms=timing.median,
                ms_p20=timing.p20,
                ms_p80=timing.p80,
                host_ms=timing.host,
                samples=timing.samples,
                bytes=0,
                gbps=0.0,
                copy_percent=None,
                peak_bytes=memory.peak,
                allocated_bytes=memory.allocated,
                error=None,
                config=config,
            )
        )
    return rows


def _timeline(
    subject: Subject, known: list[tuple[float, int]], device: torch.device
) -> list[tuple[float, int]]:
    if known:
        return known
    subject.prepare()
    return memory_timeline(subject.run, device).timeline


def _thin(timeline: list[tuple[float, int]], points: int = 150) -> list[tuple[float, int]]:
    """The highest point of each of `points` equal spans of time, so that the peak survives."""
    if not timeline:
        return []
    span = max(timeline[-1][0] / points, 1e-9)
    highest: dict[int, tuple[float, int]] = {}
    for when, held in timeline:
        slot = int(when / span)
        if slot not in highest or held > highest[slot][1]:
            highest[slot] = (round(when, 2), held)
    return list(highest.values())


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
