"""Feature flow regularization with accelerate: attach before ``prepare``, add ``flow.loss()`` before
``backward``.

pip install '.[hf,demo]'          # in a checkout
python examples/accelerate_loop.py --epochs 2              # or: accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common.data import load
from common.models import build, flow_layers
from torch.utils.data import DataLoader, TensorDataset

from ffr_ext import FeatureFlow


def main(argv: list[str] | None = None) -> float:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--model", default="resnet20")
    arguments.add_argument("--accumulate", type=int, default=2, help="micro-batches per optimiser step")
    options = arguments.parse_args(argv)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=options.accumulate)
    torch.manual_seed(0)
    images = load("digits")
    model = build(options.model, images.classes, images.channels)
    # Before prepare(), which wraps the model and may compile it.
    flow = FeatureFlow(model, flow_layers(model), gradient=3.0, curvature=3.0).attach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)
    loader = DataLoader(
        TensorDataset(images.train_x, images.train_y), 128 // options.accumulate, shuffle=True
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(options.epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y) + flow.loss()  # backward() divides by the micro-batches
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, length {flow.terms().gradient.mean():.3f}"
        )
    flow.detach()

    model.eval()
    with torch.no_grad():
        accuracy = float((model(images.test_x).argmax(1) == images.test_y).float().mean())
    accelerator.print(f"test accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
