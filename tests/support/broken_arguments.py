"""Calls of native ops with one argument that breaks their contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def call(op: str, good: dict[str, Any], **bad: Any) -> None:
    """The op with good arguments, or with some of them replaced by ``change(good argument)``."""
    arguments = {name: bad[name](value) if name in bad else value for name, value in good.items()}
    getattr(torch.ops.ffr_ext, op)(*arguments.values())


def change(index: int, to: Any) -> Any:
    """A list with one entry replaced by ``to(entry)``."""
    return lambda items: [to(item) if i == index else item for i, item in enumerate(items)]


def strided(x: Tensor) -> Tensor:
    """The same sizes, every other element of a larger tensor."""
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def overlapping(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)
