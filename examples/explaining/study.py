"""The study behind examples/flowers.py: train a small net, score every method against the masks, draw the pages."""

from __future__ import annotations

import copy
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
import torch.nn.functional as F
from flowers import Flowers, class_names, flowers
from torch import Tensor, nn

from explaining import methods
from ffr_ext.explain import (
    Selection,
    average_visualizations,
    draw_averages,
    draw_explanation,
    explain,
    feature_vectors,
    localization,
    select_features,
)

EPOCHS = 24
# "easy": no distractors and half the training, where the method is known to lose.
VARIANTS: dict[str, dict[str, Any]] = {
    "single": dict(variant="single"),
    "double": dict(variant="double"),
    "easy": dict(variant="single", distractors=0),
}
LAYERS, LAST = ["2", "5", "8"], "8"
MUS = (1.0, 2.0, 5.0, 10.0, 20.0)


def small_net(classes: int) -> nn.Sequential:
    """Three strided convolutions with batch norm and in-place ReLU, the mean, a linear layer; 112 channels."""

    def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *block(3, 16, 5), *block(16, 32, 3), *block(32, 64, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


def train(data: Flowers, epochs: int, seed: int, batch: int = 50) -> nn.Sequential:
    torch.manual_seed(seed)
    model = small_net(len(data.classes))
    steps = -(-len(data.images) // batch)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps * epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.images)).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data.images[chosen]), data.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def batches(data: Flowers, size: int = 100) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data.images.split(size), data.labels.split(size), strict=True))


@torch.no_grad()
def accuracy(model: nn.Module, data: Flowers) -> float:
    return float((model(data.images).argmax(1) == data.labels).float().mean())


def compared(model: nn.Module, learned: Flowers) -> tuple[dict[str, methods.Method], list[Selection]]:
    """Every row of the table, and the selections at all of ``MUS``."""
    loader = batches(learned)
    path = select_features(model, loader, layers=LAYERS, classes=learned.classes, mu=MUS)
    five = path[MUS.index(5.0)]
    last = select_features(model, loader, layers=[LAST], classes=learned.classes, mu=20.0)
    rows = {
        "gradient": methods.from_the_logit(),
        "guided from the logit": methods.from_the_logit(relu="guided", strides="transpose"),
        "guided + stride fix, floor": methods.from_the_logit(relu="guided", align="floor"),
        "guided + stride fix, exact": methods.from_the_logit(relu="guided", align="exact"),
        "Grad-CAM": methods.grad_cam(LAST),
        "selected features (mu 5, 3 layers), no fix": methods.selected(five, strides="transpose"),
        "selected + stride fix, floor": methods.selected(five, align="floor"),
        "selected + stride fix, exact": methods.selected(five, align="exact"),
        "selected, last layer only, mu 20, exact": methods.selected(last, align="exact"),
        "image deviation from its mean (no net)": methods.deviation,
        "everything": methods.everything,
    }
    return rows, path


def score(model: nn.Module, rows: dict[str, methods.Method], tested: Flowers) -> list[dict[str, Any]]:
    """IoU at the best common threshold, area under the curve, grid, for the class of each image."""
    results = []
    for name, method in rows.items():
        heat = method(model, tested.images, tested.labels)
        found = localization(heat, tested.masks)
        # The grid is measured on maps of one scale, as the IoU is.
        scaled = heat / heat.flatten(1).amax(1).clamp(min=1e-30)[:, None, None]
        results.append(
            {
                "method": name,
                "iou": found.iou,
                "auc": found.auc,
                "iou_best": found.iou_best,
                "grid": methods.grid(scaled),
            }
        )
    return results


def sweep(model: nn.Module, path: Sequence[Selection], tested: Flowers) -> list[dict[str, Any]]:
    """How well the selected channels alone tell unseen images, for each bound."""
    v = feature_vectors(model, tested.images, path[0])
    return [
        {
            "mu": s.mu,
            "accuracy": float((s.scores(v).argmax(1) == tested.labels).float().mean()),
            "channels": int((s.weights != 0).any(1).sum()),
            "by_layer": "+".join(str(len(s.channels(layer))) for layer in s.layers),
        }
        for s in path
    ]


@torch.no_grad()
def without(model: nn.Module, data: Flowers, channels: dict[str, Tensor]) -> float:
    """Accuracy with channels set to zero behind their layers."""
    handles = [
        model.get_submodule(layer).register_forward_hook(
            lambda module, args, output, gone=gone: output.index_fill(1, gone, 0)
        )
        for layer, gone in channels.items()
    ]
    try:
        return accuracy(model, data)
    finally:
        for handle in handles:
            handle.remove()


def removal(model: nn.Module, selection: Selection, tested: Flowers, draws: int = 20) -> list[dict[str, Any]]:
    """Is what is selected needed? Beside as many channels of the same layers, at random."""
    chosen = {layer: torch.tensor(selection.channels(layer), dtype=torch.long) for layer in selection.layers}
    generator = torch.Generator().manual_seed(0)
    random = []
    for _ in range(draws):
        drawn = {
            layer: torch.randperm(selection.layers[layer], generator=generator)[: len(gone)]
            for layer, gone in chosen.items()
        }
        random.append(without(model, tested, drawn))
    others = {
        layer: torch.tensor(
            [c for c in range(selection.layers[layer]) if c not in gone.tolist()], dtype=torch.long
        )
        for layer, gone in chosen.items()
    }
    return [
        {"removed": "nothing", "accuracy": accuracy(model, tested), "spread": 0.0},
        {"removed": "the selected", "accuracy": without(model, tested, chosen), "spread": 0.0},
        {"removed": "as many at random", "accuracy": fmean(random), "spread": pstdev(random)},
        {"removed": "all but the selected", "accuracy": without(model, tested, others), "spread": 0.0},
    ]


def random_upper_weights(
    model: nn.Module, rows: dict[str, methods.Method], learned: Flowers, tested: Flowers, seed: int
) -> list[dict[str, Any]]:
    """Correlation of heatmaps of the trained net with those of the net whose upper weights are random.

    A map that explains the decision should change. "head": the linear layer; "head and last block": the last
    convolution with its norm, too. A selection is kept, or made again on the changed net.
    """
    results = []
    chosen = ["gradient", "guided + stride fix, exact", "Grad-CAM", "selected + stride fix, exact"]
    for name, layers in (("head", ["11"]), ("head and last block", ["6", "7", "11"])):
        changed = copy.deepcopy(model)
        torch.manual_seed(1000 + seed)
        for layer in layers:
            changed.get_submodule(layer).reset_parameters()
        again = select_features(
            changed, batches(learned), layers=LAYERS, classes=learned.classes, mu=5.0, targets="predictions"
        )
        pairs = [(row, rows[row], rows[row]) for row in chosen]
        pairs[-1] = (f"{chosen[-1]}, selection kept", rows[chosen[-1]], rows[chosen[-1]])
        pairs.append((f"{chosen[-1]}, selected again", rows[chosen[-1]], methods.selected(again)))
        for row, before, after in pairs:
            a, b = (m(net, tested.images, tested.labels) for m, net in ((before, model), (after, changed)))
            results.append({"random": name, "method": row, "correlation": methods.correlation(a, b)})
    return results


def one(
    learned: Flowers, tested: Flowers, epochs: int, seed: int
) -> tuple[dict[str, list[dict[str, Any]]], Any]:
    """Train, and measure everything once."""
    start = time.perf_counter()
    model = train(learned, epochs, seed)
    rows, path = compared(model, learned)
    five = path[MUS.index(5.0)]
    results = {
        "methods": score(model, rows, tested),
        "mu": sweep(model, path, tested),
        "removal": removal(model, five, tested),
        "random": random_upper_weights(model, rows, learned, tested, seed),
    }
    print(
        f"  seed {seed}: test accuracy {accuracy(model, tested):.1%}, {five!r}, {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    return results, (model, five)


def run(variants: Sequence[str], seeds: Sequence[int], epochs: int, learn: int, test: int, out: Path) -> None:
    """All variants and seeds: print the tables, write them as CSV, draw the pages of the first seed."""
    out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        print(f"{variant}:", flush=True)
        options = VARIANTS[variant]
        names = class_names(options["variant"])
        for seed in seeds:
            learned, tested = (
                Flowers(*flowers(count, seed=2 * seed + part, **options), names)
                for part, count in enumerate((learn, test))
            )
            results, (model, selection) = one(
                learned, tested, epochs // 2 if variant == "easy" else epochs, seed
            )
            for table, found in results.items():
                tables.setdefault(table, []).extend(
                    {"variant": variant, "seed": seed, **row} for row in found
                )
            if seed == seeds[0]:
                draw(model, selection, learned, tested, out, variant)
    report(tables, out)


def run_published(data: Flowers, seeds: Sequence[int], epochs: int, out: Path) -> None:
    """The same on images from a folder, a tenth of them for the test."""
    out.mkdir(parents=True, exist_ok=True)
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    held = max(len(order) // 10, 1)
    tested, learned = (
        Flowers(data.images[part], data.labels[part], data.masks[part], data.classes)
        for part in (order[:held], order[held:])
    )
    tables: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        results, (model, selection) = one(learned, tested, epochs, seed)
        for table, found in results.items():
            tables.setdefault(table, []).extend(
                {"variant": "an8Flower", "seed": seed, **row} for row in found
            )
        if seed == seeds[0]:
            draw(model, selection, learned, tested, out, "an8flower")
    report(tables, out)


def report(tables: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Print one table for each question, means over the seeds; write every row."""
    keys = {"methods": ["method"], "mu": ["mu"], "removal": ["removed"], "random": ["random", "method"]}
    shown = {
        "methods": ["iou", "auc", "grid"], "mu": ["accuracy", "channels"], "removal": ["accuracy", "spread"],
        "random": ["correlation"],
    }  # fmt: skip
    for table, rows in tables.items():
        write_csv(out / f"{table}.csv", rows)
        variants = list(dict.fromkeys(row["variant"] for row in rows))
        print(f"\n{table}: {', '.join(shown[table])}; mean over seeds")
        print("| |" + "|".join(variants) + "|")
        print("|---|" + "---|" * len(variants))
        for key in dict.fromkeys(tuple(row[k] for k in keys[table]) for row in rows):
            cells = []
            for variant in variants:
                of_key = [
                    r for r in rows if r["variant"] == variant and tuple(r[k] for k in keys[table]) == key
                ]
                cells.append(
                    " / ".join(f"{fmean(row[value] for row in of_key):.3f}" for value in shown[table])
                )
            print("|" + ", ".join(map(str, key)) + "|" + "|".join(cells) + "|")


def draw(
    model: nn.Module, selection: Selection, learned: Flowers, tested: Flowers, out: Path, variant: str
) -> None:
    first = [int((tested.labels == c).nonzero()[0]) for c in tested.labels.unique()[:6]]
    images, target = tested.images[first], tested.labels[first]
    page = draw_explanation(
        images,
        explain(model, images, selection, target=target),
        masks=tested.masks[first],
        classes=tested.classes,
    )
    page.savefig(out / f"heat-{variant}.png", dpi=60)
    averages = average_visualizations(model, batches(learned), selection)
    draw_averages(averages, per_class=5).savefig(out / f"averages-{variant}.png", dpi=60)
    selection.save(out / f"selection-{variant}.json")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
