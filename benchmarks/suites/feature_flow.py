"""What the penalty adds to a training step when its gradients are made at once or just in time.

``python -m benchmarks.suites.feature_flow`` trains twelve cheap blocks of one shape, so that the penalty is
not lost in the network's own time. Providers: plain torch (eager), the same compiled, `ffr_loss` (one node
for all features), and `FeatureFlow`. Added time is the median over rounds of the difference to the step
without penalty of the same round, added memory the difference of the peaks in per cent of the captured
features' bytes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ffr_ext import FeatureFlow, ffr_loss, reference

from ..harness.measure import Effort, Subject, peak_memory, time_in_turns

PLAIN = "none"
PROVIDERS = (PLAIN, "eager", "compile", "ffr_loss", "FeatureFlow")
DEPTH = 12


@dataclass(frozen=True)
class Case:
    """Twelve features of one shape."""

    shape: tuple[int, ...]
    norm: str = "l1"
    dtype: torch.dtype = torch.float32

    @property
    def feature_bytes(self) -> int:
        """Of all features."""
        return DEPTH * torch.Size(self.shape).numel() * self.dtype.itemsize


CASES = (
    Case((8, 16, 32, 32)),  # 0.5 MB a feature: in cache
    Case((64, 16, 32, 32)),  # 4 MB: beyond most caches
    Case((64, 16, 32, 32), norm="l2_squared"),
)
CUDA_CASES = (
    Case((128, 64, 32, 32)),
    Case((256, 256, 56, 56), dtype=torch.bfloat16),  # the first stage of ResNet-50
    Case((256, 256, 56, 56), "l2_squared", torch.bfloat16),
)
TINY = (Case((2, 2, 3, 3)),)


class Block(nn.Module):
    """relu(x + w x): a residual block with next to no work."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, 1, 1) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + x * self.weight)


class Step:
    """Forward and backward of the blocks, with the penalty of one provider."""

    def __init__(self, case: Case, provider: str, device: torch.device) -> None:
        torch.manual_seed(0)
        blocks = [Block(case.shape[1]) for _ in range(DEPTH)]
        self.model = nn.Sequential(*blocks).to(device, case.dtype)
        self.x = torch.randn(case.shape, device=device, dtype=case.dtype)
        self.flow: FeatureFlow | None = None
        self.penalty: Callable[[list[Tensor]], Tensor] | None = None
        if provider == "FeatureFlow":
            self.flow = FeatureFlow(self.model, list(self.model), norm=case.norm).attach()
        elif provider == "compile":
            self.penalty = torch.compile(
                partial(reference.ffr_loss, norm=case.norm), dynamic=False, fullgraph=True
            )
        elif provider != PLAIN:
            self.penalty = partial(reference.ffr_loss if provider == "eager" else ffr_loss, norm=case.norm)

    def prepare(self) -> None:
        """Outside the measured time."""
        self.model.zero_grad(set_to_none=True)

    def run(self) -> None:
        """Forward, loss, backward."""
        if self.penalty is not None:
            features = [self.x]
            for block in self.model:
                features.append(block(features[-1]))
            loss = features[-1].square().mean() + self.penalty(features[1:])
            del features
        else:
            loss = self.model(self.x).square().mean()
            if self.flow is not None:
                loss = loss + self.flow.loss()
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """Of all parameters, after one run."""
        self.prepare()
        self.run()
        return [p.grad.double() for p in self.model.parameters() if p.grad is not None]


class Result(NamedTuple):
    """One provider. Times in milliseconds."""

    provider: str
    step_ms: float
    added_ms: float
    added_peak_percent: float  # of the captured features' bytes
    error: float  # largest difference of a parameter's gradient to eager torch's, of the largest


def run_case(case: Case, providers: Sequence[str], device: torch.device, effort: Effort) -> list[Result]:
    """One result per provider, the step without penalty first."""
    torch.compiler.reset()
    names = [PLAIN, *(name for name in providers if name != PLAIN)]
    steps = {name: Step(case, name, device) for name in names}
    truth = Step(case, "eager", device).gradients()
    largest = max(grad.abs().max().item() for grad in truth)
    timings = time_in_turns({name: [Subject(s.run, s.prepare)] for name, s in steps.items()}, device, effort)
    peaks = {name: peak_memory(Subject(step.run, step.prepare), device).peak for name, step in steps.items()}
    results = []
    for name, step in steps.items():
        differences = [a - b for a, b in zip(timings[name].times, timings[PLAIN].times, strict=True)]
        errors = [(a - b).abs().max().item() for a, b in zip(step.gradients(), truth, strict=True)]
        results.append(
            Result(
                name,
                timings[name].median,
                statistics.median(differences),
                100 * (peaks[name] - peaks[PLAIN]) / case.feature_bytes,
                float("nan") if name == PLAIN else max(errors) / largest,
            )
        )
    return results


def main(arguments: Sequence[str] | None = None) -> list[tuple[Case, list[Result]]]:
    """Print a table for each case, and return the numbers."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.suites.feature_flow", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", nargs="*", default=PROVIDERS, choices=PROVIDERS)
    parser.add_argument("--seconds", type=float, default=3.0, help="per provider and case")
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    effort = Effort(rounds=15, seconds=options.seconds, most_seconds=3 * options.seconds)
    if options.tiny:
        effort = Effort(warmup=1, rounds=2, seconds=0.0)
    cases = TINY if options.tiny else CUDA_CASES if device.type == "cuda" else CASES
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    everything = []
    for case in cases:
        results = run_case(case, options.providers, device, effort)
        everything.append((case, results))
        shape = " x ".join(map(str, case.shape))
        print(
            f"\n{DEPTH} x ({shape}) {case.dtype}, {case.norm}, {case.feature_bytes / 1e6:.1f} MB of features"
        )
        print(f"{'provider':20} {'step ms':>9} {'added ms':>9} {'peak, % of features':>20} {'error':>8}")
        for r in results:
            print(
                f"{r.provider:20} {r.step_ms:9.2f} {r.added_ms:9.2f} {r.added_peak_percent:20.1f} {r.error:8.1e}"
            )
    return everything


if __name__ == "__main__":
    main()
