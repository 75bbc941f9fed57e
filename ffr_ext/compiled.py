"""What a traced graph (torch.compile, torch.export) gets in the place of a call of the kernels.

With `backend="auto"` on a CPU that is the loss in plain operations (`DecomposedStats`): Inductor makes the sums in the
loops that make the features, and the gradients in those that read them. Else it is the kernels as functional ops. Those
of `ops` fill tensors the caller allocated: traced, such a call is wrapped so that the graph stays functional, and
Inductor then merges the equal-looking empty gradients and clones them again, one copy of every gradient. An op that
returns its tensors has none of that. In eager mode the extra hop through Python would only cost time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import backends, ops
from .reference import at_positions
from .stages import Sums

# Asked here, since Dynamo cannot trace the question.
_CHANNELS_LAST_CONVOLUTIONS = torch.backends.mkldnn.is_available()

DECOMPOSED = "decomposed"  # the backend of `DecomposedStats`, which no user names

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


def to_leave_graph(feature: Tensor, copied: bool) -> Tensor:
    """A feature as it should leave a traced graph. An output gets the traced strides, but on a CPU Inductor lays out
    images in channels_last, as its convolutions want them: a contiguous output would be a transposed copy, and its
    gradient would have the whole backward pass transpose. `copied`: never the same tensor."""
    if feature.dim() == 4 and feature.device.type == "cpu" and _CHANNELS_LAST_CONVOLUTIONS:
        left = feature.contiguous(memory_format=torch.channels_last)
        if left is not feature:
            return left
    return feature.clone() if copied else feature


def resolve(backend: str, device: torch.device) -> str:
    """`backends.resolve`, or DECOMPOSED where that is faster in a compiled step."""
    if backend == "auto" and device.type == "cpu" and torch.compiler.is_compiling():
        return DECOMPOSED
    return backends.resolve(backend, device)


def decomposed_stats(
    walked: Sequence[Tensor],
    lengths: Sequence[int],
    sums: Sums,
    padding: Tensor | None = None,
    known: bool = False,
) -> Tensor:
    """`DecomposedStats` of the features of stages of these lengths."""
    wanted = torch.is_grad_enabled() and any([f.requires_grad for f in walked])  # noqa: C419  as in `stages.align`
    # Dynamo cannot trace a node that nobody differentiates.
    run = DecomposedStats.apply if wanted else DecomposedStats.forward
    stats: Tensor = run(tuple(lengths), known, sums.squared, sums.leading, padding, *walked)
    return stats


class DecomposedStats(torch.autograd.Function):
    """`DecomposedStats.apply(lengths, known, squared, leading, padding, *features) -> stats`: `autograd.FlowStats` in
    plain operations, in float32 (float64 for float64 features). Saves the features, which layers save anyway. `known`:
    of each stage's first differences only the last counts."""

    @staticmethod
    def forward(
        lengths: Sequence[int],
        known: bool,
        squared: bool,
        leading: int,
        padding: Tensor | None,
        *features: Tensor,
    ) -> Tensor:
        sums = []
        for stage in _by_stage(lengths, features):
            wide = [_widened(feature) for feature in stage]
            first = [after - before for before, after in pairwise(wide)]
            second = [after - before for before, after in pairwise(first)]
            for d in [*(first[-1:] if known else first), *second]:
                sums.append(_grouped(d.square() if squared else d.abs(), leading))
        return torch.cat(sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        lengths, known, squared, leading, padding, *features = inputs
        ctx.set_materialize_grads(False)
        ctx.settings = lengths, known, squared, leading
        ctx.save_for_backward(padding, *features)

    @staticmethod
    def backward(ctx: Any, grad_stats: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_stats is None:
            return (None,) * len(ctx.needs_input_grad)
        lengths, known, squared, leading = ctx.settings
        padding, *features = ctx.saved_tensors
        grads: list[Tensor] = []
        used = 0
        for stage in _by_stage(lengths, features):
            groups = math.prod(stage[0].shape[:leading])
            entries = ops.stats_entries(len(stage), groups) - (known and len(stage) - 2) * groups
            grads += _stage_gradients(stage, grad_stats[used : used + entries], known, squared, leading)
            used += entries
        if padding is not None:
            grads = [grad.masked_fill(at_positions(padding, grad.dim()), 0) for grad in grads]
        wanted = ctx.needs_input_grad[5:]
        return (None,) * 5 + tuple([g if want else None for g, want in zip(grads, wanted, strict=True)])


def _stage_gradients(
    stage: Sequence[Tensor], coef: Tensor, known: bool, squared: bool, leading: int
) -> list[Tensor]:
    """d loss / d features of a stage. The differences are those of the forward pass with the other sign: of the same
    expressions the compiler would keep the forward pass's, a copy of the features."""
    wide = [_widened(feature) for feature in stage]
    first = [before - after for before, after in pairwise(wide)]
    second = [after - before for before, after in pairwise(first)]
    counted = first[-1:] if known else first
    shape = [*stage[0].shape[:leading], *[1] * (stage[0].dim() - leading)]
    each = coef.view(len(counted) + len(second), *shape).unbind()
    slopes = [c * (2 * d if squared else d.sign()) for c, d in zip(each, [*counted, *second], strict=True)]
    along: list[Tensor | None] = [None] * (len(first) - len(counted)) + slopes[: len(counted)]
    for index, bend in enumerate(slopes[len(counted) :]):
        along[index] = _minus(along[index], bend)
        along[index + 1] = _plus(along[index + 1], bend)
    ends = [None, *along, None]
    return [
        _minus(after, before).to(f.dtype) for (before, after), f in zip(pairwise(ends), stage, strict=True)
    ]


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor:
    if b is None:
        assert a is not None
        return a
    return -b if a is None else a - b


def _by_stage(lengths: Sequence[int], features: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    slices, first = [], 0
    for length in lengths:
        slices.append(features[first : first + length])
        first += length
    return slices


def _widened(feature: Tensor) -> Tensor:
    return feature if feature.dtype == torch.float64 else feature.float()


def _grouped(values: Tensor, leading: int) -> Tensor:
    """One sum for each index of the first `leading` dimensions."""
    rest = list(range(leading, values.dim()))
    return (values.sum(rest) if rest else values).reshape(-1)


def _flow_stats(
    features: list[Tensor],
    lengths: list[int],
    groups: list[int],
    squared: bool,
    save_signs: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    stats, signs = empty_stats(features, lengths, groups, save_signs)
    ops.flow_kernels(backend).forward(features, lengths, groups, squared, stats, signs)
    return stats, signs


def _flow_stats_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    features, lengths, groups, _squared, save_signs, _backend = arguments
    return empty_stats(features, lengths, groups, save_signs)


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
    given, nothing = iter(grads), coef.new_empty(0)
    slots = [next(given) if want else nothing for want in wanted]
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
