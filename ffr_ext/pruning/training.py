"""Does the compact model still run in training mode, where that uses more of the model than eval mode does?

An auxiliary classifier (GoogLeNet, Inception) reads features in training mode only. The graph that compaction walks is
that of eval mode and does not show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .copying import deep_copy
from .tracing import OUT_OF_MEMORY, TracedGraph


def unreached_parameters(graph: TracedGraph, model: nn.Module) -> list[str]:
    """Parameters that no op of the graph reads."""
    read = {name for node, name in graph.tensor_names.items() if node.users}
    return [name for name, _ in model.named_parameters() if graph.name_of[name] not in read]


def failure_in_training_mode(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What a forward pass in training mode raises, if anything. Of the model nothing changes."""
    trial = deep_copy(model)  # a forward pass in training mode counts batches and keeps statistics
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    for module in trial.modules():
        module.training = not isinstance(module, nn.SyncBatchNorm)  # which would wait for the other ranks
    gpus = {p.device.index for p in trial.parameters() if p.is_cuda}
    try:
        # Dropout draws from the generators, and leaves them as they were.
        with torch.no_grad(), torch.random.fork_rng(gpus, device_type="cuda"):
            trial(*args, **kwargs)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # the model's own code decides what a wrong size raises
        return f"{type(error).__name__}: {error}"
    return None
