"""What each process of the distributed tests runs: train `Tower` on its part of the batch and write what
came out.

torchrun --nproc-per-node 2 tests/support/ddp_worker.py MODE FOLDER
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from flow_models import Tower
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ffr_ext import FeatureFlow

OPTIONS: dict[str, Any] = {"gradient": 2.0, "curvature": 1.0}
STEPS = 3


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of all parameters; sharded ones are gathered."""
    grads = [parameter.grad for parameter in parameters]
    whole = [
        grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads if grad is not None
    ]
    return [grad.detach().clone() for grad in whole]


def train(mode: str) -> list[list[Tensor]]:
    """The gradients of every step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights as the test's own model
    model = Tower()
    x, y = (part.chunk(world)[rank] for part in Tower.data())
    flow = FeatureFlow(model, **OPTIONS)
    wrapped: Any
    if "fsdp2" in mode:
        from torch.distributed.fsdp import fully_shard

        if "attach first" in mode:
            flow.attach()
        mesh = dist.init_device_mesh("cpu", (world,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(
            model, static_graph="static" in mode, find_unused_parameters="unused" in mode
        )
    flow.attach()
    if "compile" in mode:
        wrapped = torch.compile(wrapped, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for step in range(STEPS):
        optimizer.zero_grad()
        # torch's own limit: the very first backward pass of a static graph must not be inside no_sync().
        micro = 2 if "no_sync" in mode and not (step == 0 and "static" in mode) else 1
        for index, (part, labels) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
            with nullcontext() if index == micro - 1 else wrapped.no_sync():
                loss = nn.functional.cross_entropy(wrapped(part), labels) + flow.loss()
                (loss / micro).backward()
        history.append(gradients(list(model.parameters())))
        optimizer.step()
    return history


def main(folder: Path, modes: list[str]) -> None:
    dist.init_process_group("gloo")
    for mode in modes:
        history = train(mode)
        if dist.get_rank() == 0:
            torch.save(history, folder / f"{mode}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
