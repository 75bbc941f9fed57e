"""The smaller networks: what died by itself, and what a budget asks for; exact cuts, measured."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from examples.common.data import batches
from examples.common.models import ResidualBlock, build
from ffr_ext import Compaction, compact, zero_small_filters
from ffr_ext.pruning import prune_to
from ffr_ext.pruning.measure import count_flops, count_parameters

from .training import Run, accuracy, step

DIED = 1e-2  # effective scale at which a filter counts as dead


def rows_of(run: Run, budgets: list[float], on_test: bool, finetune: bool = True) -> list[dict[str, Any]]:
    """A row for each smaller network: by what died, and to each share of the FLOPs; without and with fine-tuning."""
    images = run.split.images
    judged = (images.test_x, images.test_y) if on_test else run.split.validation
    whole = accuracy(run.model, judged)
    rows = []
    for cut in ["died", *budgets]:
        try:
            made = _cut(run, cut)
        except ValueError as error:
            rows.append(
                {"cut": cut, "finetuned": 0, "accuracy_whole": whole, "note": str(error).splitlines()[0]}
            )
            continue
        base = {"cut": cut, "accuracy_whole": whole, **_sizes(run, made)}
        rows.append({**base, "finetuned": 0, "accuracy": accuracy(made.model, judged), "note": ""})
        if finetune and run.settings.finetune_epochs:
            _finetune(run, made.model)
            epochs = run.settings.finetune_epochs
            rows.append({**base, "finetuned": epochs, "accuracy": accuracy(made.model, judged), "note": ""})
    return rows


def _cut(run: Run, cut: str | float) -> Compaction:
    model = copy.deepcopy(run.model).eval()
    if cut == "died":
        zero_small_filters(model, DIED)
        return compact(model, run.example, measure=True)
    share = min(1.0, float(cut) * original_sizes(run)[1] / count_flops(model, (run.example,), {}))
    return prune_to(model, run.example, flops=share, energy="effective", scope="all")


def original_sizes(run: Run) -> tuple[int, int]:
    """Parameters and FLOPs of the network before any training (generations have made theirs smaller)."""
    images = run.split.images
    model = build(run.settings.model, images.classes, images.channels)
    return count_parameters(model), count_flops(model, (run.example,), {})


def _sizes(run: Run, made: Compaction) -> dict[str, Any]:
    """Shares that are left of the network as it was built, blocks and layers that are gone, latency."""
    report = made.report
    latency = report.latency or (float("nan"), float("nan"))
    parameters, flops = original_sizes(run)
    blocks = [sum(isinstance(m, ResidualBlock) for m in model.modules()) for model in (run.model, made.model)]
    layers = [
        sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
        for model in (run.model, made.model)
    ]
    return {
        "parameters_left": report.parameters[1] / parameters,
        "flops_left": report.flops[1] / flops,
        "latency_left": latency[1] / latency[0],
        "latency_ms": 1e3 * latency[1],
        "blocks_removed": blocks[0] - blocks[1],
        "layers_removed": layers[0] - layers[1],
        "max_error": report.max_error,
    }


def _finetune(run: Run, model: nn.Module) -> None:
    """A short training without any penalty, of the same length and from the same batches for every method."""
    settings = run.settings
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    x_all, y_all = run.split.train
    steps = -(-len(x_all) // settings.batch_size) * settings.finetune_epochs
    optimizer = torch.optim.SGD(
        model.parameters(), lr=settings.lr / 10, momentum=settings.momentum, weight_decay=5e-4, nesterov=True
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(settings.finetune_epochs):
        for x, y in batches(x_all, y_all, settings.batch_size, generator, run.split.images.augment):
            step(model, optimizer, [], x, y)
            scheduler.step()
