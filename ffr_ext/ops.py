"""The dispatcher's view of the kernels: schemas, fakes, and which op a backend means. Contract: docs/design.md
section 5.

The native module declares the schemas when it is there; without it they are declared here, so that
`torch.ops.ffr_ext.*` always exists and an exported graph can be loaded anywhere. But for `new_compacted` and
`compacted` the ops only fill tensors the caller has allocated, so their fakes do nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends
from .kernels.sizes import plane_bytes

SCHEMAS = {
    "flow_forward": "(Tensor[] features, int[] lengths, SymInt[] groups, bool squared, "
    "Tensor(a!) stats, Tensor(b!) signs) -> ()",
    "flow_backward": "(Tensor[] features, Tensor signs, Tensor coef, int[] lengths, SymInt[] numels, "
    "SymInt[] groups, bool squared, Tensor(a!)[] grads) -> ()",
    "flow_backward_at": "(Tensor[] features, Tensor signs, Tensor coef, int length, SymInt numel, SymInt groups, "
    "bool squared, int index, Tensor(a!) grad, bool accumulate) -> ()",
    "filter_norms": "(Tensor[] weights, int[] dims, float p, Tensor(a!) out) -> ()",
    "compact_filters": "(Tensor[] tensors, Tensor[] keep, int[] dims, Tensor(a!)[] outs) -> ()",
}
TRITON_SUFFIX = "_triton"
NEW_TENSORS = "(Tensor[] tensors, Tensor[] keep, int[] dims) -> Tensor[]"  # of new_compacted and compacted

_library = torch.library.Library("ffr_ext", "FRAGMENT")


def _declare() -> None:
    native = backends.native() is not None
    for name, schema in SCHEMAS.items():
        if not native:
            _library.define(name + schema)
        _library.define(name + TRITON_SUFFIX + schema)
        for key in ("CUDA", "CPU"):  # CPU: under the Triton interpreter
            _library.impl(name + TRITON_SUFFIX, _triton_implementation(name), key)
        for op in (name, name + TRITON_SUFFIX):
            torch.library.register_fake(f"ffr_ext::{op}", _fills_its_outputs, lib=_library)
    if not native:
        _library.define("new_compacted" + NEW_TENSORS)
        _library.define("compacted" + NEW_TENSORS)
        _library.impl("new_compacted", _new_compacted, "CompositeExplicitAutograd")
        _library.impl("compacted", compacted_by_torch, "CPU")
    torch.library.register_fake("ffr_ext::new_compacted", _new_compacted, lib=_library)
    torch.library.register_fake("ffr_ext::compacted", _fake_compacted, lib=_library)


def _fills_its_outputs(*_args: Any) -> None:
    """Fake of every op: shapes, dtypes and strides are those the caller allocated."""


def _new_compacted(tensors: list[Tensor], keep: list[Tensor], dims: list[int]) -> list[Tensor]:
    """The outs of `compact_filters`: dimensions in the order in memory of their source, without gaps. Where strides
    tie the order is that of the dimensions, so that a [8, 4, 1, 1] weight in channels_last stays in channels_last.
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


def compacted_by_torch(tensors: list[Tensor], keep: list[Tensor], dims: list[int]) -> list[Tensor]:
    """`compacted` in plain torch, on any device; the indices have been checked."""
    outs = _new_compacted(tensors, keep, dims)
    for tensor, index, dim, out in zip(tensors, keep, dims, outs, strict=True):
        torch.index_select(tensor, dim, index, out=out)
    return outs


def _fake_compacted(tensors: list[Tensor], keep: list[Tensor], dims: list[int]) -> list[Tensor]:
    """Also runs where one of the tensors is a meta tensor, for which the op does not exist."""
    if any(tensor.device.type != "cpu" for tensor in (*tensors, *keep)):
        raise RuntimeError("compacted takes tensors on cpu alone")
    if any(index.dtype != torch.int64 or index.dim() != 1 for index in keep):
        raise RuntimeError("keep must be 1-D int64 tensors")
    return _new_compacted(tensors, keep, dims)


def _triton_implementation(name: str) -> Callable[..., None]:
    def run(*args: Any) -> None:
        # Imported at the first call: triton is optional and slow to import.
        home = "flow" if name.startswith("flow") else "filters"
        getattr(importlib.import_module(f".kernels.{home}", __package__), name)(*args)

    return run


_declare()

# For a list of hundreds of tensors Python's part would take as long as the kernel's: `new_compacted` allocates what
# `compact_filters` fills, on any device; `compacted` does both and checks the indices, on the CPU only.
new_compacted: Callable[..., list[Tensor]] = torch.ops.ffr_ext.new_compacted.default
compacted: Callable[..., list[Tensor]] = torch.ops.ffr_ext.compacted.default


class FlowKernels(NamedTuple):
    """The three loss kernels of one backend."""

    forward: Callable[..., None]
    backward: Callable[..., None]
    backward_at: Callable[..., None]


class FilterKernels(NamedTuple):
    """The two pruning kernels of one backend."""

    norms: Callable[..., None]
    compact: Callable[..., None]


def _overloads(suffix: str) -> tuple[FlowKernels, FilterKernels]:
    op = {name: getattr(torch.ops.ffr_ext, name + suffix).default for name in SCHEMAS}
    return (
        FlowKernels(op["flow_forward"], op["flow_backward"], op["flow_backward_at"]),
        FilterKernels(op["filter_norms"], op["compact_filters"]),
    )


_NATIVE, _TRITON = _overloads(""), _overloads(TRITON_SUFFIX)


def flow_kernels(backend: str) -> FlowKernels:
    """The loss kernels of a concrete backend: "cpu" and "cuda" are one native op with two dispatch keys."""
    return (_TRITON if backend == "triton" else _NATIVE)[0]


def filter_kernels(backend: str) -> FilterKernels:
    """The pruning kernels of a concrete backend."""
    return (_TRITON if backend == "triton" else _NATIVE)[1]


def sign_bytes(length: int, numel: int) -> int:
    """Bytes of the packed signs of a stage: one plane for each first difference."""
    return (length - 1) * plane_bytes(numel)


def stats_entries(length: int, groups: int) -> int:
    """Entries of stats (and of coef) for a stage: (length - 1) x groups lengths, then (length - 2) x groups bends."""
    return (length - 1 + max(length - 2, 0)) * groups
