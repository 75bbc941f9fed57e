"""Sizes of the Triton kernels, each with its reason. The machine-code tests hold registers and access widths to them.

No autotuning: a tuner runs candidates and waits for them, which a CUDA graph capture forbids, and the kernels are bound
by memory, where these sizes only have to keep enough loads in flight (an H200 needs about 25 KiB per multiprocessor:
4.8 TB/s times 0.7 us over 132 of them).
"""

import torch

# One access of a thread: the widest the hardware has. VEC elements of a dtype fill it; their nibbles fill a word.
ACCESS_BYTES = 16

# One warp per forward program: its sums need five shuffles and neither shared memory nor a barrier. Two accesses per
# thread and feature share those shuffles; three features are loaded ahead, so a program has 4 KiB in flight and the
# 20 or more programs that fit on a multiprocessor have 80 KiB.
FORWARD_WARPS = 1
FORWARD_ACCESSES = 2

# The backward kernels sum nothing, so that their programs only need to be large enough to be cheap to start.
BACKWARD_WARPS = 4

# A forward program takes several tiles when there would be more programs than this: each leaves one fp64 per term to be
# added up, and 4096 (about one filling of an H200) are added in microseconds. A constant, not the device's
# multiprocessor count, so that the sums are the same to the last bit on every GPU.
MAX_CHUNKS = 4096

# The depth loop is unrolled (a kernel's arguments cannot be indexed at run time), so a longer stage runs in pieces of
# this many features that share two.
MAX_FEATURES = 64

# Adding up the chunks: one program per term.
FINALIZE_WARPS = 4
FINALIZE_BLOCK = 1024

# Filters: one program per filter.
FILTER_WARPS = 4
FILTER_BLOCK = 1024


def vector_length(dtype: torch.dtype) -> int:
    """Elements of `dtype` in one access."""
    return ACCESS_BYTES // dtype.itemsize
