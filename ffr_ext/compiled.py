"""What a traced graph (torch.compile, torch.export) gets in the place of a call of the kernels.

With `backend="auto"` on a CPU that is the loss in plain operations (`NewestSums`): Inductor makes the sums in the
loops that make the features, and the gradients in those that read them. Else it is the kernels as functional ops. Those
of `ops` fill tensors the caller allocated: traced, such a call is wrapped so that the graph stays functional, and
Inductor then merges the equal-looking empty gradients and clones them again, one copy of every gradient. An op that
returns its tensors has none of that. In eager mode the extra hop through Python would only cost time.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends, ops
from .reference import at_positions
from .stages import Plan, Stage, Sums

# Asked here, since Dynamo cannot trace the question.
_CHANNELS_LAST_CONVOLUTIONS = torch.backends.mkldnn.is_available()

# Dynamo of torch 2.10 hands a node its symbolic sizes in another order: wrong sums, or gradients of wrong shapes.
_MIXES_SIZES = torch.__version__ < "2.11"

DECOMPOSED = "decomposed"  # the backend of `NewestSums`, which no user names

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
    """`backends.resolve`, or DECOMPOSED in a traced graph where that is faster, or the kernels' node is not safe."""
    if backend == "auto" and torch.compiler.is_compiling() and (device.type == "cpu" or _MIXES_SIZES):
        return DECOMPOSED
    return backends.resolve(backend, device)


# What a feature adds: sums of its difference, and of its second difference where it has one.
Part = tuple[Tensor, ...]


def decomposed_parts(
    walked: Sequence[Tensor], stages: Sequence[Stage], sums: Sums, padding: Tensor | None = None
) -> list[Part]:
    """What each of the walked features of stages adds: a node for a stage. One for each feature takes as many kernels
    and longer to trace (docs/log/compiled-step.md); one for all stages took more kernels."""
    parts: list[Part] = []
    for stage in stages:
        walk = walked[len(parts) : len(parts) + stage.length]
        parts += [(), *newest_sums(walk, sums, padding, newest=stage.length - 1)]
    return parts


def stats_of(parts: Sequence[Part], lengths: Sequence[int]) -> Tensor:
    """The sums of stages of so many features as the kernels give them, from those that each feature adds."""
    ordered: list[Tensor] = []
    first = 0
    for length in lengths:
        stage = parts[first : first + length]
        ordered += [part[0] for part in stage if part] + [part[1] for part in stage if len(part) > 1]
        first += length
    return torch.cat(ordered)


def weighted_sum(
    parts: Sequence[Part], plan: Plan, weights: Sequence[tuple[float | Tensor, float | Tensor]]
) -> Tensor:
    """The sum of what counts of each stage's differences and second differences, with its two weights. Number by
    number: slices of a vector would have their backward pass in the inner loop of every gradient."""
    terms: list[Tensor] = []
    first = 0
    for stage, (on_difference, on_bend) in zip(plan.stages, weights, strict=True):
        for index in range(1, stage.length):
            difference, *bends = parts[first + index]
            if index > stage.counted_by_earlier:
                terms.append(difference * on_difference)
            terms += [bend * on_bend for bend in bends]
        first += stage.length
    return torch.cat(terms).sum()


def newest_sums(
    features: Sequence[Tensor], sums: Sums, padding: Tensor | None = None, newest: int = 1
) -> list[Part]:
    """What the last `newest` features add; of those before them two are read."""
    wanted = torch.is_grad_enabled() and any([f.requires_grad for f in features])  # noqa: C419  as in `stages.walked_strides`
    # Dynamo cannot trace a node that nobody differentiates.
    run = NewestSums.apply if wanted else NewestSums.forward
    flat: Part = run(sums.squared, sums.leading, padding, newest, *features)
    parts: list[Part] = []
    for index in range(len(features) - newest, len(features)):
        count = min(index, 2)
        parts.append(flat[:count])
        flat = flat[count:]
    return parts


class NewestSums(torch.autograd.Function):
    """`NewestSums.apply(squared, leading, padding, newest, *features) -> sums`: what each of the last `newest` features
    adds to the sums of its stage, of its difference and, from the third on, of its second difference. Plain operations
    in float32 (float64 for float64 features); saves the features, which layers save anyway."""

    @staticmethod
    def forward(
        squared: bool, leading: int, padding: Tensor | None, newest: int, *features: Tensor
    ) -> tuple[Tensor, ...]:
        x = [_widened(feature) for feature in features]
        differences: list[Tensor] = []
        for i in range(len(x) - newest, len(x)):
            step = x[i] - x[i - 1]
            differences.append(step)
            if i > 1:
                differences.append(step - (x[i - 1] - x[i - 2]))
        return tuple([_grouped(d.square() if squared else d.abs(), leading) for d in differences])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        squared, leading, padding, newest, *features = inputs
        ctx.settings = squared, leading, newest
        ctx.save_for_backward(padding, *features)

    @staticmethod
    def backward(ctx: Any, *grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        squared, leading, newest = ctx.settings
        padding, *features = ctx.saved_tensors
        x = [_widened(feature) for feature in features]
        shape = [*x[0].shape[:leading], *[1] * (x[0].dim() - leading)]
        addends: list[list[Tensor]] = [[] for _ in x]
        given = 0
        for i in range(len(x) - newest, len(x)):
            # With the other sign than in the forward pass, whose expressions the compiler would keep: copies of
            # features.
            step = x[i - 1] - x[i]
            slope = grad_sums[given].view(shape) * (2 * step if squared else step.sign())
            addends[i - 1].append(slope)
            addends[i].append(-slope)
            if i > 1:
                turn = step - (x[i - 2] - x[i - 1])
                bend = grad_sums[given + 1].view(shape) * (2 * turn if squared else turn.sign())
                addends[i - 2].append(-bend)
                addends[i - 1].append(2 * bend)
                addends[i].append(-bend)
            given += min(i, 2)
        grads = [
            functools.reduce(operator.add, terms).to(feature.dtype)
            for terms, feature in zip(addends, features, strict=True)
        ]
        if padding is not None:
            grads = [grad.masked_fill(at_positions(padding, grad.dim()), 0) for grad in grads]
        wanted = ctx.needs_input_grad[4:]
        return (None, None, None, None, *[g if want else None for g, want in zip(grads, wanted, strict=True)])


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
    _check_groups(features, lengths, groups)
    stats, signs = _empty_stats(features, lengths, groups, save_signs)
    ops.FLOW_KERNELS[backend].forward(features, lengths, groups, squared, stats, signs)
    return stats, signs


def _check_groups(features: Sequence[Tensor], lengths: Sequence[int], groups: Sequence[int]) -> None:
    """RuntimeError where the groups of a stage are not what its leading dimensions ask for."""
    for first, count in zip(itertools.accumulate(lengths[:-1], initial=0), groups, strict=True):
        shape = features[first].shape
        if count not in itertools.accumulate(shape, operator.mul, initial=1):
            raise RuntimeError(
                f"ffr_ext: expected groups of sums for the leading dimensions of {tuple(shape)}, got {count}: torch "
                f"{torch.__version__} has mixed up symbolic sizes. Take backend='auto', or torch 2.11 or newer."
            )


def _flow_stats_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    features, lengths, groups, _squared, save_signs, _backend = arguments
    return _empty_stats(features, lengths, groups, save_signs)


def by_feature(grads: Sequence[Tensor], wanted: Sequence[bool], nothing: Item) -> list[Tensor | Item]:
    """One entry for each feature: its gradient where one is wanted."""
    if False not in wanted:
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
    ops.FLOW_KERNELS[backend].backward(features, signs, coef, lengths, numels, groups, squared, slots)
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
