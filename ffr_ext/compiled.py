"""The loss kernels as functional ops, for graphs that are traced (torch.compile, torch.export).

The kernels of `ops` fill tensors the caller allocated. Traced, such a call is wrapped so that the graph stays
functional, and Inductor then merges the equal-looking empty gradients and clones them again: one copy of every
gradient. An op that returns its tensors has none of that. In eager mode the extra hop through Python would only
cost time.

Inductor lays out the features of a convolutional network in channels_last, whatever strides the traced tensors have. An
op that insists on the traced strides has every feature transposed for it, and its gradients transposed back. So these
take features as they lie, copy those that do not lie as told, and are told what Inductor is expected to choose
(`walked_layouts`). A wrong guess costs a copy, never a number: signs and gradients have the order that was told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .stages import Layout, kernel_layouts

# Asked here, since Dynamo cannot trace the question.
_CHANNELS_LAST_CONVOLUTIONS = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

SCHEMAS = {
    # `strides`: of each feature (all of them, one after another) those in which it is walked.
    "flow_stats": "(Tensor[] features, SymInt[] strides, int[] lengths, SymInt[] groups, bool squared, "
    "bool save_signs, str backend) -> (Tensor stats, Tensor signs)",
    # A feature is described by its rank, sizes and strides (all of them, one after another) and its dtype, an index into
    # DTYPES: torch 2.11 hands over its own numbers for ScalarType[]. Only wanted gradients are made.
    "flow_gradients": "(Tensor[] features, Tensor signs, Tensor coef, int[] lengths, SymInt[] numels, SymInt[] groups, "
    "bool squared, bool[] wanted, int[] ranks, SymInt[] sizes, SymInt[] strides, int[] dtypes, str backend) "
    "-> Tensor[]",
}


def empty_stats(
    features: Sequence[Tensor], lengths: Sequence[int], groups: Sequence[int], save_signs: bool
) -> tuple[Tensor, Tensor]:
    """What `flow_forward` fills: stats, and the packed signs if wanted."""
    device = features[0].device
    entries = sum(ops.stats_entries(n, g) for n, g in zip(lengths, groups, strict=True))
    packed, first = 0, 0
    for length in lengths:
        if save_signs:
            packed += ops.sign_bytes(length, features[first].numel())
        first += length
    stats = torch.empty(entries, dtype=torch.float64, device=device)
    return stats, torch.empty(packed, dtype=torch.uint8, device=device)


def _becomes_channels_last(layout: Layout, device: torch.device) -> bool:
    """Whether Inductor is expected to lay out a feature in channels_last that is contiguous in the traced graph: images
    on the CPU, where its convolutions want that. Which layers made the feature cannot be seen here."""
    image = layout.contiguous and len(layout.shape) == 4
    return image and device.type == "cpu" and _CHANNELS_LAST_CONVOLUTIONS


def to_leave_graph(feature: Tensor, copied: bool) -> Tensor:
    """A feature as it should leave a traced graph: outputs get the traced strides, which would transpose it. `copied`:
    never the same tensor."""
    if _becomes_channels_last(Layout.of(feature), feature.device):
        left = feature.contiguous(memory_format=torch.channels_last)
        if left is not feature:
            return left
    return feature.clone() if copied else feature


def walked_layouts(layouts: Sequence[Layout], device: torch.device, leading: int) -> Sequence[Layout]:
    """How the features of a stage are walked in a traced graph, and their gradients lie."""
    shape = layouts[0].shape
    if all([_becomes_channels_last(layout, device) for layout in layouts]):  # noqa: C419  as in `stages.align`
        _batch, channels, height, width = shape
        strides = (channels * height * width, 1, width * channels, channels)
        return [Layout(layout.shape, strides, layout.dtype, False) for layout in layouts]
    return kernel_layouts(layouts, leading)


def _as_told(features: Sequence[Tensor], strides: Sequence[int]) -> list[Tensor]:
    """The features in these strides; those that lie so already are not copied."""
    told, first = [], 0
    for feature in features:
        wanted = tuple(strides[first : first + feature.dim()])
        first += feature.dim()
        lies, should = Layout.of(feature), Layout(feature.shape, wanted, feature.dtype, False)
        if lies.storage_order is None or lies.storage_order != should.storage_order:
            feature = feature.new_empty_strided(feature.shape, wanted).copy_(feature)
        told.append(feature)
    return told


def _flow_stats(
    features: list[Tensor],
    strides: list[int],
    lengths: list[int],
    groups: list[int],
    squared: bool,
    save_signs: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    stats, signs = empty_stats(features, lengths, groups, save_signs)
    walked = _as_told(features, strides)
    ops.flow_kernels(backend).forward(walked, lengths, groups, squared, stats, signs)
    return stats, signs


def _flow_stats_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    features, _strides, lengths, groups, _squared, save_signs, _backend = arguments
    return empty_stats(features, lengths, groups, save_signs)


def _empty_gradients(
    device: torch.device,
    wanted: list[bool],
    ranks: list[int],
    sizes: list[int],
    strides: list[int],
    dtypes: list[int],
) -> list[Tensor]:
    grads, first = [], 0
    for want, rank, dtype in zip(wanted, ranks, dtypes, strict=True):
        axes = slice(first, first + rank)
        if want:
            grads.append(torch.empty_strided(sizes[axes], strides[axes], dtype=DTYPES[dtype], device=device))
        first += rank
    return grads


def _flow_gradients(
    features: list[Tensor],
    signs: Tensor,
    coef: Tensor,
    lengths: list[int],
    numels: list[int],
    groups: list[int],
    squared: bool,
    wanted: list[bool],
    ranks: list[int],
    sizes: list[int],
    strides: list[int],
    dtypes: list[int],
    backend: str,
) -> list[Tensor]:
    grads = _empty_gradients(coef.device, wanted, ranks, sizes, strides, dtypes)
    given, nothing = iter(grads), coef.new_empty(0)
    slots = [next(given) if want else nothing for want in wanted]
    walked = _as_told(features, strides)
    ops.flow_kernels(backend).backward(walked, signs, coef, lengths, numels, groups, squared, slots)
    return grads


def _flow_gradients_fake(*arguments: Any) -> list[Tensor]:
    _features, _signs, coef, _lengths, _numels, _groups, _squared, wanted, *described, _backend = arguments
    return _empty_gradients(coef.device, wanted, *described)


_library = torch.library.Library("ffr_ext", "FRAGMENT")
for _name, _run, _fake in (
    ("flow_stats", _flow_stats, _flow_stats_fake),
    ("flow_gradients", _flow_gradients, _flow_gradients_fake),
):
    _library.define(_name + SCHEMAS[_name], tags=(torch.Tag.flexible_layout,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffr_ext::{_name}", _fake, lib=_library)

flow_stats = torch.ops.ffr_ext.flow_stats.default
flow_gradients = torch.ops.ffr_ext.flow_gradients.default
