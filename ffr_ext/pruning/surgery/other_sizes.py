"""Does the compact model compute the same for inputs of other sizes too?

torch.export writes the sizes of the example into the graph as numbers, so that a constant that is made with one
(`x.sum((2, 3))`, `x * x.shape[-1]`) looks like any other, which the biases of what reads it could take up.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import map_tensors, tree_leaves
from ...models import OUT_OF_MEMORY, copy_without_hooks, evaluating
from ..verify import Check, Mismatch

Call = tuple[tuple[Any, ...], dict[str, Any]]


class OtherSizes:
    """Compares candidates with the source on parts of the example: a half of each dimension that the source takes in
    half. It runs copies on the CPU, because an index that is out of range there raises, and on a GPU ends the process.
    """

    def __init__(self, source: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.source = source
        self.call: Call = (args, kwargs)
        self._checks: list[Check] | None = None

    def require_equal(self, candidate: nn.Module) -> None:
        """Mismatch where the candidate computes something else than the source, or fails where that does not."""
        if self._checks is None:
            self._checks = self._found()
        for check in self._checks:
            try:
                check.require_equal(_on_cpu(candidate))
            except Mismatch as mismatch:
                shapes = [tuple(t.shape) for t in tree_leaves(check.calls[0]) if isinstance(t, Tensor)]
                raise Mismatch(f"for inputs of shapes {shapes}, {mismatch}") from mismatch

    def _found(self) -> list[Check]:
        call = map_tensors(Tensor.cpu, self.call)
        ranks = [t.dim() for t in tree_leaves(call) if isinstance(t, Tensor)]
        trial = _on_cpu(self.source)
        taken = [dim for dim in range(max(ranks, default=0)) if _runs(trial, _halved(call, [dim]))]
        together = [self._check(_halved(call, taken))] if taken else []
        if together == [None] and len(taken) > 1:  # one at a time, then
            together = [self._check(_halved(call, [dim])) for dim in taken]
        return [check for check in together if check is not None]

    def _check(self, call: Call | None) -> Check | None:
        """None where the source does not take such inputs, or gives no number for them."""
        if call is None:
            return None
        try:
            return Check(_on_cpu(self.source), *call)
        except (ValueError, *OUT_OF_MEMORY):
            return None


def _runs(model: nn.Module, call: Call | None) -> bool:
    if call is None:
        return False
    args, kwargs = map_tensors(Tensor.clone, call)  # a model may write to its inputs
    try:
        with evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(*args, **kwargs)
    except Exception:  # the model's own code decides what a size that does not fit raises
        return False
    return True


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy: a forward may keep what it has made for a size."""
    return copy_without_hooks(model).cpu()


def _halved(call: Call, dims: list[int]) -> Call | None:
    """The call with a half of each of the dimensions, of all tensors that have as many there as the first one; a batch
    of one sample twice. None where there is nothing to halve."""
    halved: Call = call
    for dim in dims:
        sizes = [t.shape[dim] for t in tree_leaves(call) if isinstance(t, Tensor) and t.dim() > dim]
        if not sizes or sizes[0] < (2 if dim else 1):
            return None
        halved = map_tensors(functools.partial(_half, dim=dim, size=sizes[0]), halved)
    return halved


def _half(tensor: Tensor, dim: int, size: int) -> Tensor:
    if tensor.dim() <= dim or tensor.shape[dim] != size:
        return tensor
    if size == 1:
        return torch.cat([tensor, tensor], dim)
    return tensor.narrow(dim, 0, (size + 1) // 2).clone()
