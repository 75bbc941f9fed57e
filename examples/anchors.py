"""LeNet-5 on MNIST by the neighbours of feature flow regularization, at settings that others have published or used.

    python examples/anchors.py lasso        --data-dir ~/mnist --out lasso.csv       # nonconvex sparse group lasso
    python examples/anchors.py out-in       --data-dir ~/mnist --out out_in.csv      # cuts to 50, 25, 12 % of the FLOPs
    python examples/anchors.py generations  --data-dir ~/mnist --out generations.csv # with and without stress

One CSV row for each thing measured, seed and settings included. MNIST's four IDX files lie in --data-dir; pixels are in
0 .. 1, as in the published code.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common.data import Images, batches, load
from common.models import LeNet5
from torch import Tensor, nn
from train import write_csv

from ffr_ext import compact
from ffr_ext.pruning import prune_to, synthesize
from ffr_ext.pruning.measure import count_flops, count_parameters
from ffr_ext.regularizers import OutInChannelLasso, SparseGroupLasso, Stress

Row = dict[str, Any]


def pixels(images: Images, limit: int | None = None) -> Images:
    """Pixels in 0 .. 1, and only the first `limit` training images."""
    low, high = images.train_x.min(), images.train_x.max()
    return replace(
        images,
        train_x=((images.train_x - low) / (high - low))[:limit],
        train_y=images.train_y[:limit],
        test_x=(images.test_x - low) / (high - low),
    )


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    pairs = batches(images.test_x, images.test_y, 1000)
    return 100 * sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs) / len(images.test_x)


def widths(model: Any) -> str:
    return f"{model.conv1.out_channels}-{model.conv2.out_channels}-{model.fc1.out_features}"


def train(
    model: nn.Module, images: Images, optimizer: torch.optim.Optimizer, generator: torch.Generator, regularizer: Any,
    after: Callable[[], None] = lambda: None, size: int = 100,
) -> None:  # fmt: skip
    """One epoch."""
    for x, y in batches(images.train_x, images.train_y, size, generator):
        optimizer.zero_grad()
        if regularizer is not None:
            regularizer.before_forward()
        F.cross_entropy(model(x), y).backward()
        if regularizer is not None:
            regularizer.after_backward()
            regularizer.add_gradients_()
        optimizer.step()
        if regularizer is not None:
            regularizer.step()
        after()


# --- nonconvex sparse group lasso ------------------------------------------------------------------------


def lasso(
    images: Images, seed: int, epochs: int, strength: float, beta: float, groups: str, rate: float
) -> list[Row]:
    """The published code's objective and optimizer: Adam, its rate cut by ten at 58, 72, 86 and 93 % of the epochs."""
    torch.manual_seed(seed)
    model = LeNet5(10)
    count = len(images.train_x)
    regularizer = SparseGroupLasso(
        model, weight=strength / count, beta=beta / count, groups=groups, example_inputs=images.test_x[:2]
    )
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    optimizer = torch.optim.Adam(
        [{"params": weights}, {"params": biases, "weight_decay": 5e-4 / count}], lr=rate
    )
    milestones = [round(epochs * share) for share in (0.58, 0.72, 0.86, 0.93)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, 0.1)
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for epoch in range(epochs):
        train(model, images, optimizer, generator, regularizer)
        scheduler.step()
        print(
            f"epoch {epoch + 1}/{epochs}: {accuracy(model, images):.2f} %, {time.process_time() - start:.0f} s",
            flush=True,
        )
    every = torch.cat([p.detach().flatten().abs() for p in weights])
    common = {
        "seed": seed,
        "epochs": epochs,
        "lambda": strength,
        "beta": beta,
        "groups": groups,
        "rate": rate,
    }
    rows = []
    for threshold in (1e-5, 1e-3, 1e-2):
        zeroed = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in zeroed.parameters():
                if parameter.dim() > 1:
                    parameter[parameter.abs() <= threshold] = 0
        smaller = compact(zeroed, images.test_x[:4], measure=False)
        dead = torch.cat([g.abs() <= threshold for g in mean_of_groups(model, groups)])
        rows.append({
            **common, "threshold": threshold, "accuracy": round(accuracy(model, images), 2),
            "zero_weights_percent": round(100 * float((every <= threshold).double().mean()), 2),
            "neuron_sparsity_percent": round(100 * float(dead.double().mean()), 2),
            "accuracy_compact": round(accuracy(smaller.model, images), 2), "widths": widths(smaller.model),
            "parameters": count_parameters(smaller.model),
            "flops": count_flops(smaller.model, (images.test_x[:1],), {}),
            "output_change": f"{smaller.report.max_error:.1e}", "cpu_seconds": round(time.process_time() - start),
        })  # fmt: skip
    return rows


def mean_of_groups(model: Any, groups: str) -> list[Tensor]:
    """Mean absolute weight of each filter and, with the paper's groups, of each input neuron."""
    layers = [model.conv1, model.conv2, model.fc1, model.fc2]
    dims = [0, 0, 1, 1] if groups == "paper" else [0, 0, 0, 0]
    return [
        m.weight.detach().movedim(d, 0).flatten(1).abs().mean(1) for m, d in zip(layers, dims, strict=True)
    ]


# --- out-in-channel --------------------------------------------------------------------------------------

CUTS = (0.5, 0.25, 0.12)
PENALTIES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "separated": {"separated": True},
    "out-in": {},
    "out-in, energy / mean of its layer": {},
}


def out_in(images: Images, seed: int, strength: float) -> list[Row]:
    """Four epochs, then three cuts with two epochs behind each; the same SGD optimizer throughout."""
    rows = []
    for name, options in PENALTIES.items():
        torch.manual_seed(seed)
        model: nn.Module = LeNet5(10)
        x = images.test_x[:2]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        generator = torch.Generator().manual_seed(seed)
        whole = count_flops(model, (x,), {})

        def penalty(model: nn.Module, options: dict[str, Any] | None = options, x: Tensor = x) -> Any:
            return None if options is None else OutInChannelLasso(model, x, weight=strength, **options)

        for _ in range(4):
            train(model, images, optimizer, generator, penalty(model))
        for target in CUTS:
            before = accuracy(model, images)
            share = target * whole / count_flops(model, (x,), {})
            normalize = "mean" if "mean" in name else "none"
            cut = prune_to(model, x, flops=share, normalize=normalize, optimizer=optimizer, measure=False)
            model = cut.model
            right_after = accuracy(model, images)
            regularizer = penalty(model)
            for _ in range(2):
                train(model, images, optimizer, generator, regularizer)
            rows.append({
                "seed": seed, "penalty": name, "lambda": strength, "target": target,
                "flops_share": round(count_flops(model, (x,), {}) / whole, 4), "accuracy_before": round(before, 2),
                "accuracy_cut": round(right_after, 2), "accuracy_after_2_epochs": round(accuracy(model, images), 2),
                "widths": widths(model), "output_change": f"{cut.report.max_error:.1e}",
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


# --- generations -----------------------------------------------------------------------------------------


def generations(
    images: Images, seed: int, attenuation: float, count: int, epochs: int, level: str
) -> list[Row]:
    """Train, synthesize, train, ...; the share of synapses that is left, and the accuracy before and after training."""
    torch.manual_seed(seed)
    model: nn.Module = LeNet5(10)
    x = images.test_x[:2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator, survivors = (torch.Generator().manual_seed(seed) for _ in range(2))
    ancestor = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    rows: list[Row] = []
    keep_dead: Callable[[], None] = lambda: None  # noqa: E731
    for generation in range(1, count + 1):
        newborn = accuracy(model, images)
        stress = Stress(model, x, attenuation=attenuation, level=level, generator=survivors)
        for _ in range(epochs):
            train(model, images, optimizer, generator, stress, keep_dead)
        left = sum(int((p != 0).sum()) for p in model.parameters() if p.dim() > 1)
        rows.append({
            "seed": seed, "level": level, "attenuation": attenuation, "generation": generation,
            "synapses_share": round(left / ancestor, 4), "efficiency": round(ancestor / left, 1),
            "accuracy_newborn": round(newborn, 2), "accuracy_trained": round(accuracy(model, images), 2),
            "widths": widths(model),
        })  # fmt: skip
        print(rows[-1], flush=True)
        child = synthesize(model, x, level=level, optimizer=optimizer, generator=survivors, measure=False)
        model, keep_dead = child.model, child.keep_dead_
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["lasso", "out-in", "generations"])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--images", type=int, help="training images; default 60,000 for lasso, 6,000 for the others"
    )
    parser.add_argument("--epochs", type=int, help="default 14 for lasso, 3 a generation")
    parser.add_argument("--strength", type=float, help="lambda; default 0.1 for lasso, 1e-3 for out-in")
    parser.add_argument("--beta", type=float, default=2.5)
    parser.add_argument("--groups", default="paper", choices=["out", "paper", "coupled"])
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--level", default="synapse", choices=["channel", "synapse"])
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--attenuations", type=float, nargs="+", default=[1.0, 0.5, 0.0])
    options = parser.parse_args(argv)
    whole = options.what == "lasso"
    images = pixels(load("mnist", options.data_dir), options.images or (None if whole else 6000))
    rows: list[Row] = []
    for found in measurements(options, images):
        rows += found
        write_csv(options.out, rows)  # what is measured stays, if a long run is stopped
    return rows


def measurements(options: argparse.Namespace, images: Images) -> Iterator[list[Row]]:
    """Rows as they come: of one seed, for generations of one attenuation."""
    for seed in range(options.seeds):
        if options.what == "lasso":
            epochs, strength = options.epochs or 14, options.strength or 0.1
            yield lasso(images, seed, epochs, strength, options.beta, options.groups, options.rate)
        elif options.what == "out-in":
            yield out_in(images, seed, options.strength or 1e-3)
        else:
            for attenuation in options.attenuations:
                epochs = options.epochs or 3
                yield generations(images, seed, attenuation, options.generations, epochs, options.level)


if __name__ == "__main__":
    main()
