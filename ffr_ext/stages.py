"""Stages and terms: which features are compared, what each term is divided by, how a stage lies in memory.

A *stage* is a maximal run of consecutive features of one shape (B, ...). With `transition="pool"` the last features of
the earlier stage (up to two) are mapped to the stage's shape and stand in front of it, its *tail*.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .reference import masked_divisor, pool_to


@dataclass(frozen=True)
class Stage:
    """A run of features of one shape. Sizes may be symbolic while a graph with dynamic shapes is traced."""

    first: int  # index of its first own feature in the caller's list
    own: int  # features of its own
    tail: int  # features mapped from the earlier stage: 0, 1 or 2
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.tail + self.own

    @property
    def differences(self) -> int:
        """First differences the kernels make (rows of stats)."""
        return self.length - 1

    @property
    def bends(self) -> int:
        """Second differences, all of which are terms of this stage."""
        return max(self.length - 2, 0)

    @property
    def counted_by_earlier(self) -> int:
        """Leading first differences that lie inside the earlier stage, which has counted them."""
        return 1 if self.tail == 2 else 0

    @property
    def gradient_terms(self) -> int:
        return self.differences - self.counted_by_earlier

    @property
    def batch(self) -> int:
        return self.shape[0]

    def groups(self, leading: int) -> int:
        """Groups that a row of stats has where there is one for each index of the first `leading` dimensions."""
        return math.prod(self.shape[:leading])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def divisor(
        self, norm: str, reduction: str, mask: Tensor | None = None, device: torch.device | None = None
    ) -> float | Tensor:
        """What phi(d) is divided by (design.md section 1): 1 for an empty feature, whose mean is 0. With a mask a
        tensor, 0-dim or one entry for each sample."""
        if mask is not None:
            return masked_divisor(self.shape, norm, reduction, mask.to(device))
        if reduction == "sum":
            return 1
        batch = max(self.batch, 1)
        if reduction == "batchmean":
            return batch
        numel = max(self.numel, 1)
        return (numel * batch) ** 0.5 if norm == "l2" else numel  # B sqrt(N / B) = sqrt(N B)


@dataclass(frozen=True, eq=False)  # a key by identity: hashing all stages took 3 us of every call
class Plan:
    """The stages that have a term, in depth order."""

    stages: tuple[Stage, ...]
    gradient_terms: int
    curvature_terms: int
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)  # what was made for it, for later calls


def make_plan(shapes: Sequence[tuple[int, ...]], transition: str) -> Plan:
    """Split `shapes` into stages; ValueError when there is no term, or when a boundary cannot be pooled."""
    stages: list[Stage] = []
    first = 0
    for index in range(1, len(shapes) + 1):
        if index < len(shapes) and shapes[index] == shapes[first]:
            continue
        tail = 0
        if stages and transition == "pool":
            checks.check_mappable(first - 1, shapes[first - 1], shapes[first])
            tail = min(stages[-1].own, 2)
        if first < len(shapes):
            stages.append(Stage(first, index - first, tail, tuple(shapes[first])))
        first = index
    stages = [s for s in stages if s.length > 1]
    gradient_terms = sum(s.gradient_terms for s in stages)
    checks.check_has_terms(shapes, gradient_terms)
    return Plan(tuple(stages), gradient_terms, sum(s.bends for s in stages))


def has_term(features: Sequence[Tensor], transition: str) -> bool:
    """Whether `make_plan` would find a term, or a boundary that cannot be pooled."""
    if transition == "pool":
        return len(features) > 1
    return any(a.shape == b.shape for a, b in itertools.pairwise(features))


def stage_features(features: Sequence[Tensor], stage: Stage) -> list[Tensor]:
    """The features the kernels walk for this stage: its mapped tail, then its own; promoted to one dtype."""
    own = list(features[stage.first : stage.first + stage.own])
    if stage.tail:
        shape = own[0].shape
        tail = features[stage.first - stage.tail : stage.first]
        checks.check_one_device(stage.first - stage.tail, [*tail, own[0]])
        own = [pool_to(f, shape) for f in tail] + own
    checks.check_one_device(stage.first - stage.tail, own)
    dtype = own[0].dtype
    if any([f.dtype != dtype for f in own]):  # noqa: C419  as in `walked_strides`
        for feature in own[1:]:
            dtype = torch.promote_types(dtype, feature.dtype)
        own = [f.to(dtype) for f in own]
    return own


class Sums(NamedTuple):
    """Which sums are made of the differences of a stage, and by whom."""

    squared: bool  # of squares; False: of absolute values
    leading: int  # one for each index of the first `leading` dimensions: 0 one in all, 1 one per sample
    backend: str  # a concrete one, not "auto"


class Layouts(NamedTuple):
    """How the features of a call lie in memory, one entry each: all that the l1 backward pass needs to know of them."""

    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    walked: list[tuple[int, ...]]  # the strides in which the kernels walk a feature, and write its gradient
    as_they_lie: bool  # all of them

    @classmethod
    def of(cls, features: Sequence[Tensor], lengths: Sequence[int], leading: int) -> Layouts:
        """Of features of stages of these lengths, whose groups of sums are the first `leading` dimensions."""
        shapes, strides = [f.shape for f in features], [f.stride() for f in features]
        walked: list[tuple[int, ...]] = []
        first = 0
        for length in lengths:
            lie = strides[first : first + length]
            if lie != [strides[first]] * length or not _in_usual_order(features[first], leading):
                lie = walked_strides(shapes[first], lie, leading)
            walked += lie
            first += length
        return cls(shapes, [f.dtype for f in features], strides, walked, walked == strides)

    def align(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features as the kernels walk them: the very same tensors, or contiguous copies."""
        return [
            f if lies == walked else f.contiguous()
            for f, lies, walked in zip(features, self.strides, self.walked, strict=True)
        ]


def _in_usual_order(feature: Tensor, leading: int) -> bool:
    """Whether a feature is dense, its first `leading` dimensions outermost: what torch can say of the usual layouts."""
    return feature.is_contiguous() or (
        leading < 2 and feature.ndim == 4 and feature.is_contiguous(memory_format=torch.channels_last)
    )


def walked_strides(
    shape: Sequence[int], strides: list[tuple[int, ...]], leading: int
) -> list[tuple[int, ...]]:
    """The strides in which the kernels walk features of one shape: as they lie, if they can be compared element by
    element in storage order, else contiguous.

    All must be dense and share one order. Each group of sums must be one storage range, so the first `leading`
    dimensions must be outermost; the batch is in contiguous and in channels_last tensors.
    """
    order = storage_order(shape, strides[0])
    groups = tuple(d for d in range(leading) if shape[d] != 1)
    if order is not None and order[: len(groups)] == groups:
        others = [lies for lies in strides if lies != strides[0]]
        # A list, not a generator: where a backward pass reads a layout, Dynamo starts it again, and torch 2.14 and
        # 2.15 then take a generator left in the middle for one that still runs.
        if all([storage_order(shape, lies) == order for lies in others]):  # noqa: C419
            return strides
    contiguous = [1]
    for size in reversed(shape[1:]):
        contiguous.insert(0, contiguous[0] * max(size, 1))
    return [tuple(contiguous)] * len(strides)


def storage_order(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...] | None:
    """Dims of size > 1 from outermost to innermost if a tensor fills its storage without gaps or overlap, else None."""
    dims = [d for d in range(len(shape)) if shape[d] != 1]
    order: tuple[int, ...] = ()
    expected = 1
    for _ in dims:  # not sorted by stride: Dynamo cannot sort by what is symbolic
        for d in dims:
            if strides[d] == expected and d not in order:
                break
        else:
            return None
        order, expected = (d, *order), expected * shape[d]
    return order


def with_strides(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`grad` in the strides of its feature, where those are dense."""
    if grad.stride() == strides or storage_order(grad.shape, strides) is None:
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)
