"""Sizes of the Triton kernels, each with its reason. The machine-code tests hold registers and access widths
to them.

No autotuning: a tuner runs candidates and waits for them, which a CUDA graph capture forbids, and the kernels
are bound by memory, where these sizes only have to keep enough loads in flight (an H200 needs about 25 KiB
per multiprocessor: 4.8 TB/s times 0.7 us over 132 of them).
"""

from typing import Any

import torch

# One access of a thread: the widest the hardware has. VEC elements of a dtype fill it; their nibbles fill a
# word.
ACCESS_BYTES = 16

# One warp per forward program: its sums need five shuffles and neither shared memory nor a barrier. Two
# accesses per thread and feature share those shuffles; three features are loaded ahead, so a program has 4
# KiB in flight and the 16 or more that fit on a multiprocessor have 64 KiB.
FORWARD_WARPS = 1
FORWARD_ACCESSES = 2

# The backward kernels sum nothing, so that their programs only need to be large enough to be cheap to start.
BACKWARD_WARPS = 4

# The depth loop is unrolled (a kernel's arguments cannot be indexed at run time), so a longer stage runs in
# pieces of this many features that share two. 64 would read 3 % less, and compile 3 to 4 times as long.
MAX_FEATURES = 32

# Adding up the tiles' sums, one program per 4096 of a term: 16 loads per thread, all in flight at once. A
# constant, not a share of the device's multiprocessors, so that the order of the sum is the same on every
# GPU.
ADD_WARPS = 8
ADD_BLOCK = 1024
ADD_PART = 4096

# Rows and columns of weights: a program's tile is one access of 32 lanes wide and 2048 elements large, 8 KiB of
# fp32 in flight for each tensor read; twice that spills in bf16. Norms take 8 tiles, one below the other: their
# columns leave 8 bytes of sums for every 128 elements of fp32.
PAIR_WARPS = 4
PAIR_TILE = 2048
PAIR_PARTS = 8
PAIR_BLOCK = 128

# Given to every launch. Fusing a product and a sum rounds once less; Triton asks to be told (3.9 warns of a new
# default).
LAUNCH: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": True}

# Filters: one program per filter.
FILTER_WARPS = 4
FILTER_BLOCK = 1024


def pair_tile(dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a tile."""
    columns = 32 * vector_length(dtype)
    return PAIR_TILE // columns, columns


def vector_length(dtype: torch.dtype) -> int:
    """Elements of `dtype` in one access."""
    return ACCESS_BYTES // dtype.itemsize


def plane_bytes(numel: int) -> int:
    """Bytes of one plane of packed signs (csrc/common/signs.h): a nibble per element, rounded up to 16 bytes so that
    every plane is aligned."""
    return 16 * ((numel + 31) // 32)
