"""What do the surviving filters look at? ResNet-20 on scikit-learn's digits, trained without and with FFR.

    python examples/survivors.py                       # trains both, 1 to 2 minutes each on one thread
    python examples/survivors.py --seeds 0 1 2
    python examples/survivors.py --model resnet8 --epochs 30

For each network: the dead filters are zeroed and cut out, the channels that tell the digits are selected on the smaller
network, and the heatmaps of the larger and of the smaller one are compared. Writes survivors.csv,
survivors-layers.csv and pictures to --out; a finished training is kept there as a checkpoint and not repeated.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.data import Images, load
from common.filters import DEAD, prune
from torch import Tensor, nn
from train import Config, Run, write_csv

from ffr_ext import sparsity
from ffr_ext.explain import (
    Explanation,
    Selection,
    average_visualizations,
    draw_averages,
    draw_explanation,
    explain,
    feature_vectors,
    select_features,
)

WITHOUT, WITH = "without FFR", "with FFR"
MU = 10.0


def norms(name: str, module: nn.Module) -> bool:
    """The layers that are looked at: behind every convolution, where a channel is a filter."""
    return isinstance(module, nn.BatchNorm2d)


def trained(config: Config, images: Images, folder: Path) -> Run:
    checkpoint = folder / f"{'with' if config.with_ffr else 'without'}-{config.seed}.pt"
    if checkpoint.exists():
        return Run.resume(checkpoint, images)
    run = Run(config, images)
    run.train()
    run.save(checkpoint)
    return run


def study(run: Run, images: Images) -> tuple[dict[str, Any], list[dict[str, Any]], nn.Module, Selection]:
    """One row of numbers, one row for each layer, the smaller network and its selection."""
    before = run.accuracy(run.model)
    pruned = prune(run.model, images.test_x[:8])
    small, zeroed = pruned.compaction.model, pruned.zeroed
    loader = list(zip(images.train_x.split(256), images.train_y.split(256), strict=True))
    selection = select_features(small, loader, layers=norms, mu=MU, skip_constant=True)
    in_source = selection.in_source(pruned.compaction.plan)
    target = images.test_y
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        larger, smaller = (
            explain(model, images.test_x, chosen, target=target)
            for model, chosen in ((zeroed, in_source), (small, selection))
        )
    told = selection.scores(feature_vectors(small, images.test_x, selection)).argmax(1)
    layers = [
        {
            "layer": row.layer,
            "filters": row.filters,
            "dead": row.dead,
            "selected": row.selected,
            "alive_selected": row.alive_selected,
        }
        for row in in_source.survivors(sparsity(zeroed), zeroed)
    ]
    alive = sum(layer.filters - layer.zero_filters for layer in pruned.filters)
    chosen = sum(len(selection.channels(layer)) for layer in selection.layers)
    numbers = {
        "test_accuracy": before,
        "filters": pruned.total,
        "alive": alive,
        "selected": chosen,
        "selected_share": chosen / alive,
        "selected_accuracy": float((told == target).float().mean()),
        "layers_with_selected": sum(bool(selection.channels(layer)) for layer in selection.layers),
        "heat_on_ink": on_ink(smaller, images.test_x),
        "largest_heat_change": float((larger.heat - smaller.heat).abs().max()),
    }
    return numbers, layers, small, selection


def on_ink(explanation: Explanation, x: Tensor) -> float:
    """Share of the heat on pixels that are more than half as dark as the image's darkest; mean over images."""
    ink = (x - x.amin((1, 2, 3), keepdim=True))[:, 0]
    ink = ink > 0.5 * ink.amax((1, 2), keepdim=True)
    mass = explanation.heat.sum((1, 2))
    return float(((explanation.heat * ink).sum((1, 2))[mass > 0] / mass[mass > 0]).mean())


def draw(model: nn.Module, selection: Selection, images: Images, out: Path, label: str) -> None:
    first = [int((images.test_y == digit).nonzero()[0]) for digit in range(0, images.classes, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shown = explain(model, images.test_x[first], selection, target=images.test_y[first])
    draw_explanation(images.test_x[first], shown).savefig(out / f"digits-heat-{label}.png", dpi=60)
    loader = list(zip(images.train_x.split(256), images.train_y.split(256), strict=True))
    page = draw_averages(average_visualizations(model, loader, selection, images=50), per_class=6)
    page.savefig(out / f"digits-averages-{label}.png", dpi=60)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    default = Config(method="ffr")
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments.add_argument("--model", default=default.model)
    arguments.add_argument("--epochs", type=int, default=default.epochs)
    arguments.add_argument(
        "--weight", type=float, default=default.ffr_gradient, help="of length and curvature"
    )
    arguments.add_argument("--backend", default=default.backend, help="see ffr_loss")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path, default=Path("runs/survivors"))
    options = arguments.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    images = load("digits")
    rows, layers = [], []
    for seed in options.seeds:
        for label, weight in ((WITHOUT, 0.0), (WITH, options.weight)):
            config = replace(
                default, model=options.model, epochs=options.epochs, seed=seed, threads=options.threads,
                ffr_gradient=weight, ffr_curvature=weight, backend=options.backend,
            )  # fmt: skip
            run = trained(config, images, options.out)
            numbers, of_layers, small, selection = study(run, images)
            rows.append({"run": label, "seed": seed, **numbers})
            layers += [{"run": label, "seed": seed, **row} for row in of_layers]
            print(
                f"{label}, seed {seed}: " + ", ".join(f"{k} {v:.4g}" for k, v in numbers.items()), flush=True
            )
            if seed == options.seeds[0]:
                draw(small, selection, images, options.out, label.split()[0])
    print(
        f"\ndead: effective scale at or below {DEAD}, zeroed and cut out; mu {MU:g}; filters behind a batch norm"
    )
    write_csv(options.out / "survivors.csv", rows)
    write_csv(options.out / "survivors-layers.csv", layers)
    return rows


if __name__ == "__main__":
    main()
