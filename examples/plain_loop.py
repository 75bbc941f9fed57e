"""Feature flow regularization in a plain training loop: two lines, a schedule, and a progress line.

python examples/plain_loop.py --epochs 5
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common.data import batches, load
from common.models import build, flow_layers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ffr_ext import FeatureFlow
from ffr_ext.schedules import WeightSchedule


def main(argv: list[str] | None = None) -> float:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--epochs", type=int, default=5)
    arguments.add_argument("--model", default="resnet20")
    options = arguments.parse_args(argv)

    torch.manual_seed(0)
    images = load("digits")
    model = build(options.model, images.classes, images.channels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)
    generator = torch.Generator().manual_seed(0)

    flow = FeatureFlow(model, flow_layers(model), gradient=3.0, curvature=3.0).attach()  # line one
    flow.describe(images.test_x[:2])
    schedule = WeightSchedule(flow, wait=5, ramp=10)

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=options.epochs * -(-len(images.train_x) // 128))
        for _ in range(options.epochs):
            for x, y in batches(images.train_x, images.train_y, 128, generator):
                loss = F.cross_entropy(model(x), y)
                penalty = flow.loss() if schedule.factor else torch.zeros(())  # line two
                optimizer.zero_grad()
                (loss + penalty).backward()
                optimizer.step()
                schedule.step()
                text = f"loss {loss.item():.3f}  penalty {penalty.item():.3f} (factor {schedule.factor:.2f})"
                if schedule.factor and penalty.requires_grad:
                    terms = flow.terms()
                    text += f"  length {terms.gradient.mean():.3f}  curvature {terms.curvature.mean():.3f}"
                progress.update(task, advance=1, description=text)
    flow.detach()

    model.eval()
    with torch.no_grad():
        accuracy = float((model(images.test_x).argmax(1) == images.test_y).float().mean())
    print(f"test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
