"""Which modules have filters, and along which dimension of their weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

BatchNorm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layer:
    """A layer with filters: a convolution or a linear layer."""

    name: str
    module: nn.Module
    dim: int  # of its weight: the filters
    norm_name: str | None  # the batch norm right behind it
    norm: nn.Module | None

    @property
    def weight(self) -> Tensor:
        weight: Any = self.module.weight
        return weight

    @property
    def gamma(self) -> Tensor | None:
        """The weight of the batch norm behind it."""
        norm: Any = self.norm
        return None if norm is None else norm.weight

    @property
    def filters(self) -> int:
        return int(self.weight.shape[self.dim])


def filter_dim(module: nn.Module) -> int | None:
    """The dimension of `module.weight` that counts the filters, or None for a module without filters."""
    if not isinstance(getattr(module, "weight", None), Tensor):
        return None
    if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
        return 0
    if isinstance(module, TRANSPOSED):
        return (
            1
            if module.groups == 1
            else 0
            if module.groups == module.in_channels == module.out_channels
            else None
        )
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' linear layer of GPT-2
        return 1
    return None
