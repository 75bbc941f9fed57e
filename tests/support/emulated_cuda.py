"""The CUDA kernels compiled for the CPU (tests/support/cuda_on_cpu) behind the signatures of the ops."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
SOURCES = [
    ROOT / "tests/support/cuda_on_cpu/entry.cpp",
    ROOT / "csrc/cuda/flow_forward.cu",
    ROOT / "csrc/cuda/flow_backward.cu",
    ROOT / "csrc/cuda/flow_backward_at.cu",
    ROOT / "csrc/cuda/filters.cu",
    ROOT / "csrc/cuda/group_norms.cu",
    ROOT / "csrc/cuda/group_scaling.cu",
]
# Few blocks, so that small tensors already give a block several tiles.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-Wno-psabi",
    f"-I{ROOT / 'tests/support/cuda_on_cpu'}",
    "-DFFR_FORWARD_BLOCKS=2",
    "-DFFR_BACKWARD_BLOCKS=2",
]
ENTRIES = [
    "flow_forward",
    "flow_backward",
    "flow_backward_at",
    "filter_norms",
    "compact_filters",
    "row_column_norms",
    "scale",
    "take_blocks",
    "take_shuffles",
]
# Set in a process that has loaded the address sanitizer before everything else.
SANITIZED = "FFR_EXT_TEST_SANITIZED"
SANITIZERS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("c++")


def build(directory: Path) -> ctypes.CDLL:
    flags = FLAGS + (SANITIZERS if os.environ.get(SANITIZED) else [])
    objects = []
    for source in SOURCES:
        objects.append(directory / f"{source.stem}_{source.suffix[1:]}.o")
        subprocess.run(
            [str(compiler()), *flags, "-x", "c++", "-c", str(source), "-o", str(objects[-1])], check=True
        )
    library = directory / "cuda_on_cpu.so"
    subprocess.run([str(compiler()), *flags, "-shared", "-o", str(library), *map(str, objects)], check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ENTRIES:
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    values = [t.data_ptr() if t is not None and t.numel() else None for t in tensors]
    return (ctypes.c_void_p * max(len(values), 1))(*values)


def _int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * max(len(values), 1))(*values)


def _int32s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int32]:
    return (ctypes.c_int32 * max(len(values), 1))(*values)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() if tensor.numel() else None)


class EmulatedKernels:
    """`launches` counts the kernels of the last call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.launches = 0

    def _done(self, launches: int) -> None:
        assert launches >= 0, f"CUDA error {-launches}"
        self.launches = launches

    def _dtypes(self, lengths: Sequence[int], tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int32]:
        firsts = [sum(lengths[:i]) for i in range(len(lengths))]
        return _int32s([DTYPES[tensors[i].dtype] if n else 0 for i, n in zip(firsts, lengths, strict=True)])

    def flow_forward(
        self,
        features: list[Tensor],
        lengths: list[int],
        groups: list[int],
        squared: bool,
        stats: Tensor,
        signs: Tensor,
    ) -> None:
        firsts = [sum(lengths[:i]) for i in range(len(lengths))]
        numels = [features[i].numel() for i in firsts]
        self._done(
            self.library.flow_forward(
                ctypes.c_int64(len(lengths)), self._dtypes(lengths, features), _int64s(lengths),
                _int64s(numels), _int64s(groups), _pointers(features), int(squared), _pointer(stats),
                _pointer(signs),
            )
        )  # fmt: skip

    def flow_backward(
        self, features: list[Tensor], signs: Tensor, coef: Tensor, lengths: list[int], numels: list[int],
        groups: list[int], squared: bool, grads: list[Tensor],
    ) -> None:  # fmt: skip
        self._done(
            self.library.flow_backward(
                ctypes.c_int64(len(lengths)), self._dtypes(lengths, grads), _int64s(lengths), _int64s(numels),
                _int64s(groups), _pointers(features), int(squared), _pointer(signs), _pointer(coef),
                _pointers(grads),
            )
        )  # fmt: skip

    def flow_backward_at(
        self, features: list[Tensor], signs: Tensor, coef: Tensor, length: int, numel: int, groups: int,
        squared: bool, index: int, grad: Tensor, accumulate: bool,
    ) -> None:  # fmt: skip
        self._done(
            self.library.flow_backward_at(
                DTYPES[grad.dtype], ctypes.c_int64(length), ctypes.c_int64(numel), ctypes.c_int64(groups),
                _pointers(features), int(squared), _pointer(signs), _pointer(coef), ctypes.c_int64(index),
                _pointer(grad), int(accumulate),
            )
        )  # fmt: skip

    def filter_norms(self, weights: list[Tensor], dims: list[int], p: float, out: Tensor) -> None:
        self._done(
            self.library.filter_norms(
                ctypes.c_int64(len(weights)), _int32s([DTYPES[w.dtype] for w in weights]), _splits(weights,
                dims), _pointers(weights), ctypes.c_double(p), _pointer(out),
            )
        )  # fmt: skip

    def row_column_norms(self, weights: list[Tensor], p: float, out: Tensor) -> None:
        self._done(
            self.library.row_column_norms(
                ctypes.c_int64(len(weights)), _int32s([DTYPES[w.dtype] for w in weights]),
                _pair_splits(weights), _pointers(weights), ctypes.c_double(p), _pointer(out),
            )
        )  # fmt: skip

    def scale(
        self, grads: list[Tensor] | None, weights: list[Tensor], rows: list[Tensor], columns: list[Tensor],
        slopes: list[float], taus: list[float],
    ) -> None:  # fmt: skip
        """add_scaled_, or without grads shrink_."""
        doubles = ctypes.c_double * max(len(weights), 1)
        self._done(
            self.library.scale(
                ctypes.c_int64(len(weights)), _int32s([DTYPES[w.dtype] for w in weights]),
                _pair_splits(weights), _pointers(weights), None if grads is None else _pointers(grads),
                _pointers(rows), _pointers(columns), doubles(*slopes), doubles(*taus),
            )
        )  # fmt: skip

    def blocks(self) -> int:
        """Of all launches since the last question."""
        return int(self.library.take_blocks())

    def shuffles(self) -> int:
        """Of the threads of all launches since the last question."""
        return int(self.library.take_shuffles())

    def compact_filters(
        self, tensors: list[Tensor], keep: list[Tensor], dims: list[int], outs: list[Tensor]
    ) -> None:
        self._done(
            self.library.compact_filters(
                ctypes.c_int64(len(tensors)), _int64s([t.element_size() for t in tensors]), _splits(tensors,
                dims), _pointers(tensors), _pointers(keep), _int64s([k.numel() for k in keep]),
                _pointers(outs),
            )
        )  # fmt: skip


def _splits(tensors: Sequence[Tensor], dims: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """[outer, dim, inner] of contiguous tensors."""
    splits: list[int] = []
    for tensor, dim in zip(tensors, dims, strict=True):
        splits += [tensor.shape[:dim].numel(), tensor.shape[dim], tensor.shape[dim + 1 :].numel()]
    return _int64s(splits)


def _pair_splits(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """[outer, first, middle, second, inner, rows_first] of dense tensors."""
    return _int64s([number for tensor in tensors for number in pair_split(tensor)])


def pair_split(tensor: Tensor) -> list[int]:
    """csrc/common/groups.h, said in another way: from the order of the dimensions in memory."""
    if tensor.numel() == 0:
        return [0, tensor.shape[0], 1, tensor.shape[1] if tensor.dim() > 1 else 1, 1, 1]
    order = sorted((d for d in range(tensor.dim()) if tensor.shape[d] > 1), key=lambda d: -tensor.stride(d))
    sizes = [tensor.shape[d] for d in order]

    def product(begin: int, end: int) -> int:
        return int(torch.tensor(sizes[begin:end]).prod()) if sizes[begin:end] else 1

    places = [order.index(d) for d in order if d < 2]
    if not places:
        return [1, 1, 1, 1, tensor.numel(), 1]
    first, last = places[0], places[-1]
    if len(places) == 1:
        return [product(0, first), sizes[first], 1, 1, product(first + 1, len(sizes)), int(order[first] == 0)]
    middle = product(first + 1, last)
    inner = product(last + 1, len(sizes))
    return [product(0, first), sizes[first], middle, sizes[last], inner, int(order[first] == 0)]
