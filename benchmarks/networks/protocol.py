"""What is done to each network, and what is recorded.

Weights are random. A random half of the gammas of every batch norm is 0, and of the filters of every layer without one
behind it; statistics, betas and biases are random. So half of the channels are constants, most of them not 0. The same
network is compacted three times: without merging constants, with it, and with the betas and biases of the dead channels
at 0 too, so that there is nothing to merge. The last is what would leave if constants were no obstacle.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ffr_ext import compact
from ffr_ext.pruning.compaction import Compaction
from ffr_ext.pruning.filters import BatchNorm, Layer
from ffr_ext.pruning.graph import constants
from ffr_ext.pruning.report import CompactionReport
from ffr_ext.pruning.scale import find_layers

from .libraries import folder_on_path
from .zoo import Network

DEAD = 0.5


@dataclass
class Outcome:
    """A row of the table. Parameters left are counts; seconds are CPU seconds of one thread."""

    network: str
    family: str
    version: str  # of the library
    parameters: int = 0
    without: int | None = None  # left without merging constants
    merged: int | None = None
    nothing_to_merge: int | None = None
    relative_error: float | None = None
    export_seconds: float | None = None  # one torch.export of the source
    compact_seconds: float | None = None
    exports: int | None = None  # how often compact traced
    unknown_ops: str = ""
    stays: str = ""  # why channels that are not live stay, the most frequent reasons
    refused: str = ""


def run(network: Network) -> Outcome:
    """ImportError where the library is missing."""
    model, inputs = _made(network)
    outcome = Outcome(network.name, network.family, _version(network.library))
    try:
        _measure(network, model, inputs, outcome)
    except ValueError as error:
        outcome.refused = str(error)
    except Exception as error:  # no refusal but a mistake: the others are measured all the same
        outcome.refused = f"{type(error).__name__}: {error}"
    return outcome


def _version(name: str) -> str:
    with folder_on_path():
        return importlib.metadata.version(name)


def _measure(network: Network, model: nn.Module, inputs: Any, outcome: Outcome) -> None:
    outcome.parameters = sum(p.numel() for p in model.parameters())
    start = time.process_time()
    layers = find_layers(model, inputs)  # an export, and little else
    outcome.export_seconds = time.process_time() - start
    randomize(model)
    kill(model, layers)
    with without_merging():
        outcome.without = compact(model, inputs, measure=False).report.parameters[1]
    with counted_exports() as exports:
        start = time.process_time()
        result = compact(model, inputs, measure=False)
        outcome.compact_seconds = time.process_time() - start
    _note(outcome, result)
    outcome.exports = exports[0]
    kill(model, layers, constants_too=True)
    outcome.nothing_to_merge = compact(model, inputs, measure=False).report.parameters[1]


def _note(outcome: Outcome, result: Compaction) -> None:
    report = result.report
    outcome.merged = report.parameters[1]
    outcome.relative_error = report.max_error / report.max_output
    outcome.unknown_ops = "; ".join(sorted({op.split(" in ")[0] for op in report.unknown_ops}))
    outcome.stays = "; ".join(f"{reason} ({count})" for reason, count in reasons(report).most_common(3))


def reasons(report: CompactionReport) -> Counter[str]:
    """Why channels that are not simply live stay -> how many, over all sets, without names and numbers."""
    found: Counter[str] = Counter()
    for channels in report.sets:
        for reason, count in channels.reasons.items():
            if not reason.startswith("live"):
                reason = re.sub(r"constant \S+ that .* cannot absorb: ", "constant, not absorbed: ", reason)
                found[re.sub(r" (in|of|by) [\w.]*\w\.[\w.]+", "", reason)] += count
    return found


def _made(network: Network) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = network.make().eval()
    return model, network.inputs()


def kill(model: nn.Module, layers: Sequence[Layer], constants_too: bool = False) -> None:
    """Half of the channels, the same ones every time; `constants_too`, with what they add behind it."""
    generator = torch.Generator().manual_seed(1)

    def zero(weight: Tensor, bias: Any, dim: int) -> None:
        dead = torch.rand(weight.shape[dim], generator=generator) < DEAD
        weight.movedim(dim, 0)[dead] = 0
        if constants_too and isinstance(bias, Tensor):
            bias[dead] = 0

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNorm) and module.weight is not None:
                zero(module.weight, module.bias, 0)
        tables = {
            id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)
        }  # a tied output is one
        for layer in layers:
            if (
                layer.norm is None
                and isinstance(layer.weight, nn.Parameter)
                and id(layer.weight) not in tables
            ):
                zero(layer.weight, layer.module.bias, layer.dim)
        for path, module in model.named_modules():
            if path.endswith("experts") and isinstance(
                stack := getattr(module, "down_proj", None), nn.Parameter
            ):
                hidden = (
                    0 if hasattr(module, "down_proj_bias") else 1
                )  # of an expert: gpt-oss has [inputs, outputs]
                for expert in stack:
                    zero(expert, None, hidden)


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """What is 0 after construction, or next to it (biases, gammas of the last norms, layer scales), and batch norms."""
    generator = torch.Generator().manual_seed(0)

    def normal(tensor: Tensor, mean: float = 0.0) -> None:
        tensor.copy_(mean + 0.3 * torch.randn(tensor.shape, generator=generator))

    for parameter in model.parameters():
        if parameter.is_floating_point() and bool(parameter.abs().max() <= 1e-3):
            normal(parameter)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                normal(module.running_mean)
                module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
            if module.weight is not None:
                normal(module.weight, 1.0)
                normal(module.bias)


@contextlib.contextmanager
def without_merging() -> Iterator[None]:
    """Inside, no channel carries the constants of others."""

    def nothing(analysis: Any) -> dict[int, Tensor]:
        return {id(read): torch.zeros_like(read.live) for read in analysis.reads}

    with mock.patch.object(constants, "_mergeable", nothing):
        yield


@contextlib.contextmanager
def counted_exports() -> Iterator[list[int]]:
    """A list of one number: how often torch.export was called inside."""
    count = [0]
    export = torch.export.export

    def counting(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return export(*args, **kwargs)

    with mock.patch.object(torch.export, "export", counting):
        yield count
