"""Packed sequences in a trace: how many steps each sequence has depends on values, which `torch.export` cannot follow.

Packing takes rows away and moves others, which says nothing about channels. So inside `unpacked` a packed sequence has
all its rows, one sequence after the other, and recurrent layers run over all of them. What is traced so is for looking
at only: the check runs the model as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside, the model can be traced with packed sequences. A model without recurrent layers is left alone."""
    layers = [m for m in model.modules() if isinstance(m, nn.RNNBase)]
    own: dict[nn.RNNBase, Any] = {m: vars(m).get("forward") for m in layers}
    try:
        for layer in layers:
            layer.forward = functools.partial(_over_all_rows, layer, layer.forward)
        with _AllRows() if layers else contextlib.nullcontext():
            yield
    finally:
        for layer in layers:
            del layer.forward
            if (before := own[layer]) is not None:
                layer.forward = before


class _AllRows(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = _REPLACEMENTS.get(getattr(func, "__name__", ""), func)
        return replacement(*args, **(kwargs or {}))


def _pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """All rows, sequence by sequence, and the sizes of batches that are all there."""
    if not batch_first:
        x = x.transpose(0, 1)
    sequences, steps = x.shape[:2]
    return x.flatten(0, 1), torch.full((steps,), sequences, dtype=torch.int64)


def _pad(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int
) -> tuple[Tensor, Tensor]:
    """The rows as sequences again. Which of them are padding depends on the lengths, so the result is no constant."""
    steps = batch_sizes.shape[0]
    x = _sequences(data, steps)
    if total_length > steps:
        x = torch.cat([x, x[:, :1].expand(-1, total_length - steps, *x.shape[2:])], 1)
    present = batch_sizes.new_empty((x.shape[1],), dtype=torch.bool).reshape(1, -1, *[1] * (x.dim() - 2))
    x = torch.where(present, x, padding_value)
    return x if batch_first else x.transpose(0, 1), batch_sizes.new_full((x.shape[0],), steps)


_REPLACEMENTS: dict[str, Callable[..., Any]] = {"_pack_padded_sequence": _pack, "_pad_packed_sequence": _pad}


def _sequences(data: Tensor, steps: int) -> Tensor:
    return data.unflatten(0, (data.shape[0] // steps, steps))


def _over_all_rows(layer: nn.RNNBase, forward: Callable[..., Any], x: Any, hx: Any = None) -> Any:
    if not isinstance(x, PackedSequence) or x.data.shape[0] % x.batch_sizes.shape[0]:
        return forward(x, hx)
    rows = _sequences(x.data, x.batch_sizes.shape[0])
    result, hidden = forward(rows if layer.batch_first else rows.transpose(0, 1), hx)
    if not layer.batch_first:
        result = result.transpose(0, 1)
    packed = PackedSequence(result.flatten(0, 1), x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    return packed, hidden
