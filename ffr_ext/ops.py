"""The dispatcher's view of the kernels: one schema, one fake and the implementations of each op. Contract:
docs/design.md section 5.

Schemas are declared here alone, whether or not the native library is there, so that `torch.ops.ffr_ext.*` always
exists and an exported graph can be loaded anywhere. The native library implements the default overload for CPU and
CUDA tensors; the overload `triton` is Triton's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .kernels.sizes import plane_bytes

# Ops that return nothing fill tensors the caller has allocated.
SCHEMAS = {
    "flow_forward": "(Tensor[] features, int[] lengths, SymInt[] groups, bool squared, "
    "Tensor(a!) stats, Tensor(b!) signs, Tensor? weights=None, Tensor(c!)? loss=None) -> ()",
    "flow_backward": "(Tensor[] features, Tensor signs, Tensor coef, int[] lengths, SymInt[] numels, "
    "SymInt[] groups, bool squared, Tensor(a!)[] grads, Tensor? upstream=None) -> ()",
    "flow_backward_at": "(Tensor[] features, Tensor signs, Tensor coef, int length, SymInt numel, SymInt groups, "
    "bool squared, int index, Tensor(a!) grad, bool accumulate) -> ()",
    # A dimension of -1: the norms of the slices of dimension 0, then those of dimension 1, in one read.
    "filter_norms": "(Tensor[] weights, int[] dims, float p, Tensor(a!) out) -> ()",
    # `wrong`: the first entry of `keep` whose indices are out of range or not unique, and then nothing is gathered; -1
    # if there is none. On a GPU, where looking would wait, always -1.
    "compact_filters": "(Tensor[] tensors, Tensor[] keep, int[] dims) -> (Tensor[] outs, int wrong)",
    # A factor for each row and column, in the compute dtype; tensors without elements where there are none.
    "add_scaled_": "(Tensor(a!)[] grads, Tensor[] weights, Tensor[] rows, Tensor[] columns, float[] slopes, "
    "float[] taus) -> ()",
    "shrink_": "(Tensor(a!)[] weights, Tensor[] rows, Tensor[] columns, float[] taus) -> ()",
}

_library = torch.library.Library("ffr_ext", "FRAGMENT")


def _declare(name: str) -> None:
    fake = _fake_compact_filters if name == "compact_filters" else _fills_its_outputs
    for op in (name, f"{name}.triton"):
        _library.define(op + SCHEMAS[name])
        torch.library.register_fake(f"ffr_ext::{op}", fake, lib=_library)
    for key in ("CUDA", "CPU"):  # CPU: under the Triton interpreter
        _library.impl(f"{name}.triton", _triton_implementation(name), key)


def _triton_implementation(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # Imported at the first call: triton is optional and slow to import.
        home = "flow" if name.startswith("flow") else "groups" if name.endswith("_") else "filters"
        return getattr(importlib.import_module(f".kernels.{home}", __package__), name)(*args)

    return run


def _fills_its_outputs(*_args: Any) -> None:
    """Shapes, dtypes and strides are those the caller allocated."""


def _fake_compact_filters(
    tensors: list[Tensor], keep: list[Tensor], dims: list[int]
) -> tuple[list[Tensor], int]:
    return new_compacted(tensors, keep, dims), -1


def new_compacted(tensors: list[Tensor], keep: list[Tensor], dims: list[int]) -> list[Tensor]:
    """What `compact_filters` returns, not filled: dimensions in the order in memory of their source, without gaps.
    Where strides tie the order is that of the dimensions, so that a [8, 4, 1, 1] weight in channels_last stays so.
    """
    outs = []
    for tensor, index, dim in zip(tensors, keep, dims, strict=True):
        sizes, strides, step, old = list(tensor.shape), [0] * tensor.dim(), 1, tensor.stride()
        sizes[dim] = index.numel()
        for d in sorted(range(tensor.dim()), key=[(stride, -d) for d, stride in enumerate(old)].__getitem__):
            strides[d] = step
            step *= max(sizes[d], 1)
        outs.append(tensor.new_empty_strided(sizes, strides))
    return outs


for _name in SCHEMAS:
    _declare(_name)
backends.native()  # registers its implementations


@cache
def kernel(name: str, backend: str) -> Callable[..., Any]:
    """The op of that name for a concrete backend: "cpu" and "cuda" are one overload with two dispatch keys."""
    overload: Callable[..., Any] = getattr(
        getattr(torch.ops.ffr_ext, name), "triton" if backend == "triton" else "default"
    )
    return overload


class FlowKernels(NamedTuple):
    """The three loss kernels of one backend."""

    forward: Callable[..., None]
    backward: Callable[..., None]
    backward_at: Callable[..., None]


FLOW_KERNELS = {
    backend: FlowKernels(*(kernel(f"flow_{way}", backend) for way in FlowKernels._fields))
    for backend in ("cpu", "cuda", "triton")
}


def sign_bytes(length: int, numel: int) -> int:
    """Bytes of the packed signs of a stage: one plane for each first difference."""
    return (length - 1) * plane_bytes(numel)


def stats_entries(length: int, groups: int) -> int:
    """Entries of stats (and of coef) for a stage: (length - 1) x groups lengths, then (length - 2) x groups bends."""
    return (length - 1 + max(length - 2, 0)) * groups
