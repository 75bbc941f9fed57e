"""The loss kernels as functional ops, for graphs that are traced (torch.compile, torch.export).

The kernels of `ops` fill tensors the caller allocated. Traced, such a call is wrapped so that the graph stays
functional, and Inductor then merges the equal-looking empty gradients and clones them again: one copy of every
gradient. An op that returns its tensors has none of that. In eager mode the extra hop through Python would only
cost time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import ops

Item = TypeVar("Item", Tensor, None)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

SCHEMAS = {
    "flow_stats": "(Tensor[] features, int[] lengths, SymInt[] groups, bool squared, bool save_signs, str backend) "
    "-> (Tensor stats, Tensor signs)",
    # A wanted gradient is described by its rank, its sizes and strides (all of them, one after another) and its dtype,
    # an index into DTYPES: torch 2.11 hands over its own numbers for ScalarType[].
    "flow_gradients": "(Tensor[] features, Tensor signs, Tensor coef, int[] lengths, SymInt[] numels, SymInt[] groups, "
    "bool squared, bool[] wanted, int[] ranks, SymInt[] sizes, SymInt[] strides, int[] dtypes, str backend) "
    "-> Tensor[]",
}


def sizes(lengths: Sequence[int], numels: Sequence[int], groups: Sequence[int]) -> tuple[int, int]:
    """Entries of stats and bytes of packed signs, for stages of so many features of so many elements."""
    entries = sum([ops.stats_entries(n, g) for n, g in zip(lengths, groups, strict=True)])
    return entries, sum([ops.sign_bytes(n, numel) for n, numel in zip(lengths, numels, strict=True)])


def empty_stats(entries: int, packed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `flow_forward` fills: stats, and `packed` bytes of signs."""
    stats = torch.empty(entries, dtype=torch.float64, device=device)
    return stats, torch.empty(packed, dtype=torch.uint8, device=device)


def _empty_stats(
    features: Sequence[Tensor], lengths: Sequence[int], groups: Sequence[int], save_signs: bool
) -> tuple[Tensor, Tensor]:
    firsts = itertools.accumulate(lengths[:-1], initial=0)
    entries, packed = sizes(lengths, [features[first].numel() for first in firsts], groups)
    return empty_stats(entries, packed if save_signs else 0, features[0].device)


def _flow_stats(
    features: list[Tensor],
    lengths: list[int],
    groups: list[int],
    squared: bool,
    save_signs: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    stats, signs = _empty_stats(features, lengths, groups, save_signs)
    ops.flow_kernels(backend).forward(features, lengths, groups, squared, stats, signs)
    return stats, signs


def _flow_stats_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    features, lengths, groups, _squared, save_signs, _backend = arguments
    return _empty_stats(features, lengths, groups, save_signs)


def by_feature(grads: Sequence[Tensor], wanted: Sequence[bool], nothing: Item) -> list[Tensor | Item]:
    """One entry for each feature: its gradient where one is wanted."""
    if all(wanted):
        return list(grads)
    given = iter(grads)
    return [next(given) if want else nothing for want in wanted]


def _empty_gradients(
    device: torch.device, ranks: list[int], sizes: list[int], strides: list[int], dtypes: list[int]
) -> list[Tensor]:
    grads, first = [], 0
    for rank, dtype in zip(ranks, dtypes, strict=True):
        axes = slice(first, first + rank)
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
    grads = _empty_gradients(coef.device, ranks, sizes, strides, dtypes)
    slots = by_feature(grads, wanted, coef.new_empty(0))
    ops.flow_kernels(backend).backward(features, signs, coef, lengths, numels, groups, squared, slots)
    return grads


def _flow_gradients_fake(*arguments: Any) -> list[Tensor]:
    _features, _signs, coef, _lengths, _numels, _groups, _squared, _wanted, *described, _backend = arguments
    return _empty_gradients(coef.device, *described)


_library = torch.library.Library("ffr_ext", "FRAGMENT")
for _name, _run, _fake in (
    ("flow_stats", _flow_stats, _flow_stats_fake),
    ("flow_gradients", _flow_gradients, _flow_gradients_fake),
):
    _library.define(_name + SCHEMAS[_name])
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffr_ext::{_name}", _fake, lib=_library)

flow_stats = torch.ops.ffr_ext.flow_stats.default
flow_gradients = torch.ops.ffr_ext.flow_gradients.default
