"""Feature flow regularization under DistributedDataParallel, on two CPU processes or on GPUs.

    torchrun --standalone --nproc-per-node 2 examples/ddp_loop.py --epochs 2

Each process penalises the features of its own part of the batch. With reduction="mean" and parts of equal
size, DDP's average of the gradients is the gradient of the penalty of the whole batch.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common.data import load
from common.models import build, flow_layers
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ffr_ext import FeatureFlow


def main(argv: list[str] | None = None) -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--model", default="resnet20")
    arguments.add_argument("--accumulate", type=int, default=2, help="micro-batches per optimiser step")
    options = arguments.parse_args(argv)

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    images = load("digits")
    model = build(options.model, images.classes, images.channels).to(device)
    flow = FeatureFlow(
        model, flow_layers(model), gradient=3.0, curvature=3.0
    ).attach()  # the model, not the wrapper
    # static_graph=True works too, if the very first backward pass is not inside no_sync() (a limit of
    # torch's DDP).
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3)
    data = TensorDataset(images.train_x, images.train_y)
    sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(data)
    loader = DataLoader(data, 64 // options.accumulate, sampler=sampler, drop_last=True)

    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(loader):
            last = (index + 1) % options.accumulate == 0
            with nullcontext() if last else ddp.no_sync():
                loss = F.cross_entropy(ddp(x.to(device)), y.to(device)) + flow.loss()
                (loss / options.accumulate).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(
                f"epoch {epoch + 1}: loss {loss.item():.3f}, length {flow.terms().gradient.mean():.3f}",
                flush=True,
            )
    flow.detach()

    model.eval()
    with torch.no_grad():
        correct = model(images.test_x.to(device)).argmax(1).cpu() == images.test_y
    if dist.get_rank() == 0:
        print(f"test accuracy {float(correct.float().mean()):.1%}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
