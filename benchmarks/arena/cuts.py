"""The smaller networks: what died by itself, and what a budget asks for; exact cuts, chosen on validation images.

Every method gets the same tries. What died: filters up to each of `THRESHOLDS` are zeroed, and the smallest network
that loses at most `TOLERANCE` is taken. A budget: what died leaves, then `prune_to` takes the weakest channels by each
of `RANKINGS`; the network that is right most often is taken, and what died already is one of them where it is small
enough. Empty residual blocks leave in all of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common.data import batches
from examples.common.models import ResidualBlock, build
from ffr_ext import compact, zero_small_filters
from ffr_ext.pruning import prune_to
from ffr_ext.pruning.measure import count_flops, count_parameters

from .training import Run, accuracy, step

THRESHOLDS = (1e-3, 1e-2, 3e-2, 1e-1)  # of the effective scale
TOLERANCE = 0.01  # of the validation images
# Which channel is the weakest: by effective scale and readers, the same against its layer's mean, by its group's norm.
RANKINGS = (("effective", "none"), ("effective", "mean"), ("paper", "none"))


@dataclass
class Cut:
    """A smaller network; none, with a note, where the budget is out of reach."""

    cut: str | float  # "died", or the share of the FLOPs that was asked for
    how: str  # which of the tries it is
    model: nn.Module | None
    flops_left: float = float("nan")
    validation: float = 0.0
    max_error: float = 0.0  # of the outputs, against the network with its channels zeroed

    @property
    def order(self) -> tuple[float, float]:
        return self.validation, -self.flops_left


def cuts_of(run: Run, budgets: list[float]) -> list[Cut]:
    """What died, and one for each budget."""
    died = _died(run)
    return [died, *(_to_budget(run, died, budget) for budget in budgets)]


def _died(run: Run) -> Cut:
    whole = accuracy(run.model, run.split.validation)
    best = _zeroed(run, 0.0)
    for threshold in THRESHOLDS:
        cut = _zeroed(run, threshold)
        if cut.validation >= whole - TOLERANCE and cut.flops_left <= best.flops_left:
            best = cut
    return best


def _zeroed(run: Run, threshold: float) -> Cut:
    model = copy.deepcopy(run.model).eval()
    if threshold:
        zero_small_filters(model, threshold)
    made = compact(model, run.example, measure=False)
    return _judged(run, "died", f"scale {threshold:g}", made.model, made.report.max_error)


def _to_budget(run: Run, died: Cut, budget: float) -> Cut:
    best = Cut(budget, "not reached", None)
    if died.flops_left <= budget:
        best = Cut(budget, f"died, {died.how}", died.model, died.flops_left, died.validation, died.max_error)
    whole = accuracy(run.model, run.split.validation)
    for energy, normalize in RANKINGS:
        if best.validation >= whole:  # nothing is lost: no ranking can do better than chance beyond
            break
        model = copy.deepcopy(run.model).eval()
        zero_small_filters(model, THRESHOLDS[1])
        share = min(1.0, budget * original_sizes(run)["flops"] / count_flops(model, (run.example,), {}))
        options: dict[str, Any] = {"energy": energy, "normalize": normalize, "scope": "all", "cap": 1.0}
        try:
            made = prune_to(model, run.example, flops=share, measure=False, **options)
        except ValueError:
            continue
        cut = _judged(run, budget, f"{energy}, {normalize}", made.model, made.report.max_error)
        if best.model is None or cut.order > best.order:
            best = cut
    return best


def _judged(run: Run, cut: str | float, how: str, model: nn.Module, error: float) -> Cut:
    model, dropped = without_empty_blocks(model, run.split.validation[0][:8])
    left = count_flops(model, (run.example,), {}) / original_sizes(run)["flops"]
    return Cut(cut, how, model, left, accuracy(model, run.split.validation), max(error, dropped))


class Shortcut(nn.Module):
    """What is left of a residual block whose branch is the same for every image: the shortcut and that constant."""

    def __init__(self, block: ResidualBlock, constant: Tensor) -> None:
        super().__init__()
        self.stride, self.new_channels = block.stride, block.new_channels
        self.register_buffer("constant", constant if bool(constant.any()) else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != 1 or self.new_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return x if self.constant is None else F.relu(x + self.constant)


@torch.no_grad()
def without_empty_blocks(model: nn.Module, images: Tensor) -> tuple[nn.Module, float]:
    """Residual blocks whose norms pass nothing on leave a copy; how far its outputs are from before.

    `compact` keeps a channel in every layer, so an empty branch still costs two convolutions of one channel.
    """
    model = copy.deepcopy(model).eval()
    before = model(images)
    for name, module in list(model.named_modules()):
        if isinstance(module, ResidualBlock) and not (
            module.norm1.weight.any() and module.norm2.weight.any()
        ):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Shortcut(module, _branch(model, module, images[:1])))
    return model, float((model(images) - before).abs().max())


def _branch(model: nn.Module, block: ResidualBlock, image: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    handle = block.norm2.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    model(image)
    handle.remove()
    return outputs[0].clone()


def original_sizes(run: Run) -> dict[str, int]:
    """Of the network before any training (generations have made theirs smaller)."""
    return sizes(build(run.settings.model, run.split.images.classes, run.split.images.channels), run.example)


def sizes(model: nn.Module, example: Tensor) -> dict[str, int]:
    return {
        "parameters": count_parameters(model),
        "flops": count_flops(model, (example,), {}),
        "blocks": sum(isinstance(m, ResidualBlock) for m in model.modules()),
        "layers": sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()),
    }


def validation_rows(run: Run, cuts: list[Cut]) -> list[dict[str, Any]]:
    """A row for each cut, by the images that strengths are chosen on."""
    whole = accuracy(run.model, run.split.validation)
    return [{**_about(run, cut), "accuracy_whole": whole, "accuracy": cut.validation} for cut in cuts]


def test_rows(run: Run, cuts: list[Cut]) -> list[dict[str, Any]]:
    """Rows for each cut by the test images, without and with fine-tuning."""
    judged = (run.split.images.test_x, run.split.images.test_y)
    whole, rows = accuracy(run.model, judged), []
    for cut in cuts:
        base = {**_about(run, cut), "accuracy_whole": whole}
        if cut.model is None:
            rows.append({**base, "finetuned": 0})
            continue
        rows.append({**base, "finetuned": 0, "accuracy": accuracy(cut.model, judged)})
        if epochs := run.settings.finetune_epochs:
            tuned = copy.deepcopy(cut.model)
            _finetune(run, tuned)
            rows.append({**base, "finetuned": epochs, "accuracy": accuracy(tuned, judged)})
    return rows


def _about(run: Run, cut: Cut) -> dict[str, Any]:
    about: dict[str, Any] = {"cut": cut.cut, "how": cut.how}
    if cut.model is not None:
        before, after = original_sizes(run), sizes(cut.model, run.example)
        about |= {f"{name}_left": after[name] / before[name] for name in ("parameters", "flops")}
        about |= {f"{name}_removed": before[name] - after[name] for name in ("blocks", "layers")}
        about["max_error"] = cut.max_error
        about["filters"] = filters(cut.model)
    return about


def filters(model: nn.Module) -> dict[str, int]:
    """Output channels of each convolution and linear layer that is left."""
    return {n: m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


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
