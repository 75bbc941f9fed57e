"""Triton's flow_forward, flow_backward and flow_backward_at, with the op contract of docs/design.md section
5.

One forward and one backward launch per stage of up to 32 features (a longer one runs in pieces that share
two), and one small launch, or two, to add up the tiles' sums. Nothing is copied to the device, waited for or
tuned: the calls can be captured in a CUDA graph.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sizes
from .flow_kernels import add_slots_kernel, backward_signs_kernel, backward_squares_kernel, forward_kernel
from .sizes import plane_bytes

_WORDS = {2: tl.uint8, 4: tl.uint16, 8: tl.uint32}


def flow_forward(
    features: Sequence[Tensor],
    lengths: Sequence[int],
    groups: Sequence[int],
    squared: bool,
    stats: Tensor,
    signs: Tensor,
    weights: Tensor | None = None,
    loss: Tensor | None = None,
) -> None:
    """Sums of |d|, |c| (or their squares) of every stage into `stats`; packed signs into `signs` unless it is
    empty; the sum of stats times `weights` into `loss`.
    """
    _check_signs(signs)
    stats_begin = signs_begin = feature = 0
    for length, stage_groups in zip(lengths, groups, strict=True):
        stage = features[feature : feature + length]
        feature += length
        if length < 2:
            continue
        numel = stage[0].numel()
        entries = (2 * length - 3) * stage_groups
        stage_stats = stats[stats_begin : stats_begin + entries]
        stats_begin += entries
        stage_signs = (
            signs[signs_begin : signs_begin + (length - 1) * plane_bytes(numel)] if signs.numel() else None
        )
        signs_begin += (length - 1) * plane_bytes(numel)
        with _device(stage_stats):
            if stage_signs is not None and stage_groups > 1:
                # A word of nibbles may straddle two groups, whose programs would both write it: one pass for
                # the signs over the whole feature, one for the sums. No norm of this package asks for both.
                _forward_stage(stage, 1, squared, stats.new_empty(2 * length - 3), stage_signs)
                stage_signs = None
            _forward_stage(stage, stage_groups, squared, stage_stats, stage_signs)
    if weights is not None and loss is not None:
        loss.copy_((stats * weights).sum())


def _forward_stage(
    stage: Sequence[Tensor], groups: int, squared: bool, stats: Tensor, signs: Tensor | None
) -> None:
    length, numel = len(stage), stage[0].numel()
    if numel == 0:
        stats.zero_()
        return
    stage = [_aligned(feature) for feature in stage]
    shape = _StageShape.of(stage[0].dtype, numel, groups)
    block = 32 * sizes.FORWARD_WARPS * sizes.FORWARD_ACCESSES * shape.vec
    tiles = triton.cdiv(shape.group_numel, block)
    # One tile: its sums are the group's, and go where they belong.
    slots = (
        stats if tiles == 1 else torch.empty(stats.numel() * tiles, dtype=shape.slots, device=stats.device)
    )
    bytes_per_plane = plane_bytes(numel)
    for begin, end in _pieces(length - 1):
        read = min(end + 2, length) - begin
        forward_kernel[(groups * tiles,)](
            tuple(stage[begin : begin + read]),
            stage[0] if signs is None else signs[begin * bytes_per_plane :],
            slots,
            shape.group_numel,
            bytes_per_plane,
            tiles,
            groups,
            begin * groups,
            (length - 1 + begin) * groups,
            LENGTH=read,
            FIRSTS=end - begin,
            SECONDS=min(end, length - 2) - begin,
            SQUARED=squared,
            SIGNS=signs is not None,
            VECTOR=shape.vector,
            COMPUTE=shape.compute,
            VEC=shape.vec,
            WORD=_WORDS[shape.vec],
            TERMS=triton.next_power_of_2(end - begin),
            BLOCK=block,
            num_warps=sizes.FORWARD_WARPS,
            **sizes.LAUNCH,
        )
    while tiles > 1:
        parts = triton.cdiv(tiles, sizes.ADD_PART)
        sums = (
            stats
            if parts == 1
            else torch.empty(stats.numel() * parts, dtype=stats.dtype, device=stats.device)
        )
        add_slots_kernel[(stats.numel() * parts,)](
            slots,
            sums,
            tiles,
            parts,
            PART=sizes.ADD_PART,
            BLOCK=sizes.ADD_BLOCK,
            num_warps=sizes.ADD_WARPS,
            **sizes.LAUNCH,
        )
        slots, tiles = sums, parts


def flow_backward(
    features: Sequence[Tensor],
    signs: Tensor,
    coef: Tensor,
    lengths: Sequence[int],
    numels: Sequence[int],
    groups: Sequence[int],
    squared: bool,
    grads: Sequence[Tensor],
    upstream: Tensor | None = None,
) -> None:
    """The gradient of every feature whose tensor in `grads` is not empty: from `signs`, or if `squared` from
    features; `coef` is multiplied by `upstream`.
    """
    _check_signs(signs)
    if upstream is not None:
        coef = coef * upstream
    coef_begin = signs_begin = feature = 0
    for length, numel, stage_groups in zip(lengths, numels, groups, strict=True):
        entries = max(2 * length - 3, 0) * stage_groups
        planes = max(length - 1, 0) * plane_bytes(numel)
        stage = _Stage(
            features=features[feature : feature + length] if squared else (),
            signs=signs[signs_begin : signs_begin + planes],
            coef=coef[coef_begin : coef_begin + entries],
            length=length,
            numel=numel,
            groups=stage_groups,
        )
        wanted = [grad if grad.numel() else None for grad in grads[feature : feature + length]]
        feature, coef_begin, signs_begin = feature + length, coef_begin + entries, signs_begin + planes
        with _device(coef):
            for begin, end in _pieces(length):
                _backward_piece(stage, squared, begin, wanted[begin:end], accumulate=False)


def flow_backward_at(
    features: Sequence[Tensor],
    signs: Tensor,
    coef: Tensor,
    length: int,
    numel: int,
    groups: int,
    squared: bool,
    index: int,
    grad: Tensor,
    accumulate: bool,
) -> None:
    """The gradient of feature `index` of one stage, into or added to `grad`."""
    _check_signs(signs)
    if not 0 <= index < length:
        raise IndexError(f"index must be in [0, {length}), got {index}")
    with _device(coef):
        _backward_piece(
            _Stage(features, signs, coef, length, numel, groups), squared, index, [grad], accumulate
        )


class _Stage(NamedTuple):
    features: Sequence[Tensor]  # empty when the gradients come from signs
    signs: Tensor
    coef: Tensor
    length: int
    numel: int
    groups: int


def _backward_piece(
    stage: _Stage, squared: bool, begin: int, wanted: Sequence[Tensor | None], accumulate: bool
) -> None:
    """Gradients of features begin .. begin + len(wanted)."""
    tensors = [grad for grad in wanted if grad is not None]
    if not tensors or stage.numel == 0:
        return
    if stage.length < 2:  # in no term
        if not accumulate:
            tensors[0].zero_()
        return
    first_plane = max(begin - 2, 0)
    lead = begin - first_plane
    last_plane = min(begin + len(wanted) - 1, stage.length - 2)
    read = stage.features[first_plane : min(last_plane + 3, stage.length)] if squared else ()
    targets = [None if grad is None else _aligned(grad) for grad in wanted]
    shape = _StageShape.of(tensors[0].dtype, stage.numel, stage.groups)
    block = 32 * sizes.BACKWARD_WARPS * shape.vec
    tiles = triton.cdiv(shape.group_numel, block)
    common: dict[str, Any] = dict(
        LENGTH=len(wanted),
        LEAD=lead,
        PLANES=last_plane + 1 - first_plane,
        ACCUMULATE=accumulate,
        VECTOR=shape.vector,
        COMPUTE=shape.compute,
        VEC=shape.vec,
        BLOCK=block,
        num_warps=sizes.BACKWARD_WARPS,
        **sizes.LAUNCH,
    )
    grid = (stage.groups * tiles,)
    at = (stage.groups, first_plane, stage.length - 1)
    if squared:
        backward_squares_kernel[grid](
            tuple(_aligned(feature) for feature in read),
            stage.coef,
            tuple(targets),
            shape.group_numel,
            tiles,
            *at,
            READ=len(read),
            **common,
        )
    else:
        bytes_per_plane = plane_bytes(stage.numel)
        backward_signs_kernel[grid](
            stage.signs,
            stage.coef,
            tuple(targets),
            shape.group_numel,
            tiles,
            bytes_per_plane,
            *at,
            WORD=_WORDS[shape.vec],
            **common,
        )
    for grad, target in zip(wanted, targets, strict=True):
        if grad is not None and target is not None and grad is not target:
            grad.copy_(target)


class _StageShape(NamedTuple):
    """What the kernels of a stage are specialised on."""

    group_numel: int
    vec: int  # elements of one 16-byte access
    vector: bool  # every group begins and ends with a whole access
    compute: tl.dtype
    slots: torch.dtype  # of a tile's sums: the compute precision, which is what they are made in

    @classmethod
    def of(cls, dtype: torch.dtype, numel: int, groups: int) -> "_StageShape":
        vec = sizes.vector_length(dtype)
        group_numel = numel // groups
        vector = group_numel % vec == 0
        if dtype == torch.float64:
            return cls(group_numel, vec, vector, tl.float64, torch.float64)
        return cls(group_numel, vec, vector, tl.float32, torch.float32)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it does not begin at a multiple of 16 bytes.

    Every mix of aligned and other pointers would otherwise be compiled anew, for seconds each time. Only
    views that begin inside of an allocation are ever copied: torch's allocators align to 64 bytes and more.
    """
    return tensor if tensor.data_ptr() % sizes.ACCESS_BYTES == 0 else tensor.clone()


def _pieces(length: int) -> Iterator[tuple[int, int]]:
    """0 .. length in ranges of up to MAX_FEATURES."""
    for begin in range(0, length, sizes.MAX_FEATURES):
        yield begin, min(begin + sizes.MAX_FEATURES, length)


def _check_signs(signs: Tensor) -> None:
    if signs.data_ptr() % sizes.ACCESS_BYTES:
        raise ValueError(
            f"signs must begin at a multiple of {sizes.ACCESS_BYTES} bytes, got {signs.data_ptr():#x}"
        )


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device and its current stream; the tensors may be on another."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
