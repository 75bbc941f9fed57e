"""The size and the cost of a model: parameters, bytes, FLOPs, latency."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import map_tensors
from ..models import deep_copy, evaluating


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def count_flops(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """FLOPs of one forward pass."""
    return flop_counter(model, args, kwargs).get_total_flops()


def flop_counter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch's `FlopCounterMode` after one forward pass of a copy, in which a forward may keep what it likes."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton where that is installed

    # Without gradients: FlopCounterMode fails where a module is called with a tensor that wants one, such as a class
    # token.
    trial = deep_copy(model).requires_grad_(False)
    args, kwargs = map_tensors(Tensor.detach, (args, kwargs))
    with evaluating(trial), _op_by_op(trial), FlopCounterMode(display=False) as counter:
        trial(*args, **kwargs)
    return counter


@contextmanager
def _op_by_op(model: nn.Module) -> Iterator[None]:
    """Without the fused ops that FlopCounterMode takes for free: attention's and encoder layers' in evaluation, and
    oneDNN's LSTM."""
    fused = torch.backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.mkldnn.flags(enabled=False) if recurrent else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def measure_latency(
    models: tuple[nn.Module, nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], seconds: float = 0.5
) -> tuple[float, float]:
    """Median seconds of a forward pass of each, run in turns so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    with evaluating(*models):
        for model in models:
            _timed(model, args, kwargs)
        begin = time.perf_counter()
        while len(times[0]) < 3 or (len(times[0]) < 50 and time.perf_counter() - begin < seconds):
            for model, taken in zip(models, times, strict=True):
                taken.append(_timed(model, args, kwargs))
    before, after = (sorted(t)[len(t) // 2] for t in times)
    return before, after


def _timed(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    _synchronize(device)
    begin = time.perf_counter()
    model(*args, **kwargs)
    _synchronize(device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()
