"""Lists of tensors as the pruning kernels take them: dense, their dimensions in any order in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tensor_list(name: str, tensors: Any) -> list[Tensor]:
    """`tensors` as a list, or TypeError naming the argument and the index."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a sequence of tensors, got one Tensor; pass [tensor]")
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{name}: expected a sequence of tensors, got {type(tensors).__name__}")
    listed = list(tensors)
    for index, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{index}]: expected a Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{index}]: expected a dense (strided) tensor, got layout {tensor.layout}")
    return listed


def dense(tensor: Tensor) -> Tensor:
    """`tensor` itself, or a copy without gaps and overlaps whose dimensions have the same order in memory."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: -strides[d])
    ordered = tensor.permute(order)
    if ordered.is_contiguous():
        return tensor
    return ordered.contiguous().permute([order.index(d) for d in range(len(order))])
