"""What each process of the regularizers' distributed tests runs: train a small network on its part of the batch, by
itself, in DDP or sharded, and write the weights that came out.

torchrun --nproc-per-node 2 tests/support/weights_worker.py FOLDER MODE...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ffr_ext.pruning import prune_to, synthesize
from ffr_ext.regularizers import OutInChannelLasso, ScaleLasso, SparseGroupLasso, Stress

STEPS = 4


def network() -> nn.Module:
    """No size is a multiple of two ranks everywhere, and no layer looks at the batch as a whole."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(80, 7), nn.ReLU(), nn.Linear(7, 4),
    ).double()  # fmt: skip
    with torch.no_grad():
        model[1].weight.uniform_(0.1, 1)
    return model


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=generator), torch.arange(8) % 4


X = data()[0]
SPARSE: dict[str, Any] = {"weight": 3e-3, "beta": 0.05}
KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "slimming": lambda m: ScaleLasso(m, weight=0.05),
    "slimming-prox": lambda m: ScaleLasso(m, weight=0.5, form="prox"),
    "out-l0": lambda m: SparseGroupLasso(m, **SPARSE),
    "paper-scad-prox": lambda m: SparseGroupLasso(m, sparse="scad", groups="paper", form="prox", **SPARSE),
    "coupled-l1_l2": lambda m: SparseGroupLasso(
        m, sparse="l1_l2", groups="coupled", example_inputs=X, **SPARSE
    ),
    "coupled-prox": lambda m: SparseGroupLasso(
        m, sparse=None, groups="coupled", example_inputs=X, form="prox", weight=8e-3
    ),
    "out-in": lambda m: OutInChannelLasso(m, X, weight=0.02, include_norm=True),
    "stress-channel": lambda m: Stress(m, X, attenuation=0.3),
    "stress-synapse": lambda m: Stress(m, X, attenuation=0.3, level="synapse"),
}
WRAPS = ("ddp", "fsdp2")
MODES = [
    *(f"{kind} {wrap}" for kind in KINDS for wrap in WRAPS),
    *(f"{kind} fsdp2 loss" for kind in ("out-l0", "coupled-l1_l2", "out-in", "slimming")),
    "out-in ddp micro",
    "stress-channel ddp micro",
    *(f"coupled-prox {wrap} scaler" for wrap in WRAPS),
]


def wrap(model: nn.Module, how: str) -> Any:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    return model


def part_of(data: Tensor, index: int, micro: int, rank: int, world: int) -> Tensor:
    """A micro-batch of a rank; one process takes those of both ranks at once."""
    ranks = [rank] if world > 1 else [0, 1]
    return torch.cat([data.chunk(2)[r].chunk(micro)[index] for r in ranks])


def train(mode: str, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
    """The weights after some steps, and what the regularizer says of them."""
    kind, how, *more = [*mode.split(), ""]
    model = network()
    regularizer = KINDS[kind](model)
    wrapped = wrap(model, how if world > 1 else "")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    micro = 2 if "micro" in more else 1
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled="scaler" in more)
    for step in range(STEPS):
        optimizer.zero_grad()
        for index in range(micro):
            a, b = (part_of(each, index, micro, rank, world) for each in data())
            alone = wrapped.no_sync() if how == "ddp" and world > 1 and index < micro - 1 else nullcontext()
            regularizer.before_forward()
            with alone:
                loss = nn.functional.cross_entropy(wrapped(a), b) / micro
                loss = loss * float("inf") if step in (0, 2) and scaler.is_enabled() else loss
                scaler.scale(loss + regularizer.loss() if "loss" in more else loss).backward()
            regularizer.after_backward()
        if "loss" not in more:
            scaler.unscale_(optimizer)
            regularizer.add_gradients_()
        scaler.step(optimizer)
        scaler.update()
        regularizer.step()
    result = {f"term {name}": value for name, value in regularizer.terms().items()}
    result["loss"] = regularizer.loss().detach()
    for name, parameter in model.named_parameters():
        whole: Any = parameter.detach()
        result[name] = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
    return {name: tensor.detach().clone() for name, tensor in result.items()}


def smaller() -> dict[str, Tensor]:
    """Networks that all ranks make for themselves have to be the same."""
    model = network().eval()
    generator = torch.Generator().manual_seed(3)
    found = {"budget": prune_to(model, X, flops=0.6, measure=False).model}
    for level in ("channel", "synapse"):
        for _ in range(2):
            found[level] = synthesize(model, X, level=level, generator=generator, measure=False).model
    return {f"{name} {n}": p.detach() for name, m in found.items() for n, p in m.named_parameters()}


def apart(rank: int) -> list[str]:
    """What is said where ranks would go apart."""
    said = []
    model = network()
    attempts: list[Callable[[], Any]] = [
        lambda: synthesize(model, X, generator=torch.Generator().manual_seed(rank)),
        lambda: Stress(model, X, every=1, generator=torch.Generator().manual_seed(rank)).before_forward(),
        lambda: prune_to(
            model, X, flops=0.7, energy=torch.randn(20, generator=torch.Generator().manual_seed(rank))
        ),
    ]
    for attempt in attempts:
        try:
            attempt()
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return said


def main(folder: Path, modes: list[str]) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    for mode in modes:
        torch.save(train(mode, rank, world), folder / f"{mode} {rank}.pt")
    torch.save(smaller(), folder / f"smaller {rank}.pt")
    torch.save(apart(rank), folder / f"apart {rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
