"""What is known of a tensor's values: live (depends on the input), or a constant.

A `State` holds two tensors that broadcast to the shape of the tensor they speak of. A dimension along which
nothing changes has size 1, so the state of a feature map of [B, C, H, W] is usually a [1, C, 1, 1] tensor,
and the state of the output of a pointwise op is that very op applied to states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def on_cpu(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: new tensors are on the CPU, as all states are, whatever torch.set_default_device says."""

    @wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.get_default_device().type == "cpu":
            return function(*args, **kwargs)
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True)
class State:
    """`value` where not `live`; `value` is 0 where live, so that arithmetic on it stays finite."""

    value: Tensor
    live: Tensor

    @property
    def rank(self) -> int:
        return self.live.dim()

    def all_constant(self) -> bool:
        return not bool(self.live.any())

    def zero(self) -> Tensor:
        """Where the tensor is known to be exactly 0."""
        return (self.value == 0) & ~self.live


def live(rank: int) -> State:
    ones = (1,) * rank
    return State(torch.zeros(ones, dtype=torch.float64), torch.ones(ones, dtype=torch.bool))


def constant(value: Tensor) -> State:
    return State(value, torch.zeros((1,) * value.dim(), dtype=torch.bool))


def make(value: Tensor, live: Tensor) -> State:
    """A state with the garbage at live places set to 0. Not-a-number is nothing to build on: it counts as
    live."""
    if value.is_floating_point():
        live = live | value.isnan()
    if bool(live.any()):
        value = torch.where(live, torch.zeros((), dtype=value.dtype), value)
    return State(value, live)


def per_index(state: State, dim: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The state reduced to one dimension: value [size], live [size], uniform [size].

    An index is live if it is live anywhere. `uniform` says that a constant index has one value over all other
    dimensions; where it has not, `value` is the one in the middle.
    """
    rest = [d for d in range(state.rank) if d != dim % state.rank]
    live = state.live.any(dim=rest) if rest else state.live
    value = state.value.double()
    if rest:
        uniform = value.amin(dim=rest) == value.amax(dim=rest)
        for d in sorted(rest, reverse=True):
            value = value.select(d, value.shape[d] // 2)
    else:
        uniform = torch.ones_like(live)
    return value.expand(size), live.expand(size), uniform.expand(size)


def along(vector: Tensor, dim: int, rank: int) -> Tensor:
    """A vector as a tensor of `rank` that lies along `dim`."""
    shape = [1] * rank
    shape[dim % rank] = vector.numel()
    return vector.reshape(shape)


def fill_dims(tensor: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """The tensor with `dims` brought to full size."""
    return tensor.expand([shape[d] if d in dims else tensor.shape[d] for d in range(len(shape))])
