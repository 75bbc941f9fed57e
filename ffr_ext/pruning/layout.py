"""Memory layouts for the pruning kernels: they see contiguous tensors, whatever order the strides of the
user's are in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tensor_list(name: str, tensors: Any) -> list[Tensor]:
    """`tensors` as a list, or TypeError naming the argument and the index."""
    if isinstance(tensors, Tensor):
        raise TypeError(f"{name}: expected a sequence of tensors, got one Tensor; pass [tensor]")
    listed = list(tensors)
    for index, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}[{index}]: expected a Tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}[{index}]: expected a dense (strided) tensor, got layout {tensor.layout}")
    return listed


def stride_order(tensor: Tensor) -> list[int]:
    """The dimensions from the largest stride to the smallest. The sort is stable, so that a [O, I, 1, 1]
    weight in channels_last, whose strides (I, 1, I, I) tie, comes out as channels_last and not as
    contiguous."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: -strides[d])


def in_order(order: list[int]) -> bool:
    """Whether a permutation changes nothing: the usual case, in loops over all weights of a network."""
    return order == _NATURAL[len(order)] if len(order) < len(_NATURAL) else order == sorted(order)


_NATURAL = [list(range(rank)) for rank in range(6)]


def inverse(order: list[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return order if in_order(order) else [order.index(d) for d in range(len(order))]


def permuted(tensor: Tensor, order: list[int]) -> Tensor:
    """`tensor.permute(order)`, or the tensor itself where that is the same."""
    return tensor if in_order(order) else tensor.permute(order)


def dense(tensor: Tensor) -> Tensor:
    """`tensor` itself, or a copy without gaps and overlaps whose dimensions have the same order in memory."""
    order = stride_order(tensor)
    ordered = permuted(tensor, order)
    return tensor if ordered.is_contiguous() else permuted(ordered.contiguous(), inverse(order))


def as_contiguous(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """A contiguous permutation of `tensor` (a view where it is dense, else a copy) and the order of its
    dimensions."""
    order = stride_order(tensor)
    return permuted(tensor.detach(), order).contiguous(), order
