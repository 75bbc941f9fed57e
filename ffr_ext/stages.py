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
    if any(f.dtype != dtype for f in own):
        for feature in own[1:]:
            dtype = torch.promote_types(dtype, feature.dtype)
        own = [f.to(dtype) for f in own]
    return own


@dataclass(slots=True)  # not frozen: made for every feature at every call, and that takes three times as long
class Layout:
    """How a feature lies in memory: all that the l1 backward pass needs to know of it."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.is_contiguous())

    @property
    def storage_order(self) -> tuple[int, ...] | None:
        """Dims of size > 1 from outermost to innermost if the tensor fills its storage without gaps or overlap,
        else None.

        Two tensors of one shape with equal orders can be compared element by element in storage order.
        """
        dims = [d for d in range(len(self.shape)) if self.shape[d] != 1]
        if not self.contiguous:
            dims.sort(key=lambda d: self.strides[d], reverse=True)
            expected = 1
            for d in reversed(dims):
                if self.strides[d] != expected:
                    return None
                expected *= self.shape[d]
        return tuple(dims)


class Sums(NamedTuple):
    """Which sums are made of the differences of a stage, and by whom."""

    squared: bool  # of squares; False: of absolute values
    leading: int  # one for each index of the first `leading` dimensions: 0 one in all, 1 one per sample
    backend: str  # a concrete one, not "auto"


def walk_as_they_lie(layouts: Sequence[Layout], leading: int) -> bool:
    """Whether the kernels can walk features of one shape in storage order, without a copy.

    All must be dense and share one order. Each group of sums must be one storage range, so the first `leading`
    dimensions must be outermost; the batch is in contiguous and in channels_last tensors.
    """
    if all(layout.contiguous for layout in layouts):
        return True
    order = layouts[0].storage_order
    groups = tuple(d for d in range(leading) if layouts[0].shape[d] != 1)
    if order is None or order[: len(groups)] != groups:
        return False
    return all(layout.storage_order == order for layout in layouts[1:])


def kernel_layouts(layouts: Sequence[Layout], leading: int) -> Sequence[Layout]:
    """The layouts in which the kernels write the gradients of a stage: as the features lie, or contiguous if
    `align` copies.
    """
    if walk_as_they_lie(layouts, leading):
        return layouts
    strides = [1]
    for size in reversed(layouts[0].shape[1:]):
        strides.insert(0, strides[0] * max(size, 1))
    return [Layout(layout.shape, tuple(strides), layout.dtype, True) for layout in layouts]


def align(features: Sequence[Tensor], leading: int) -> list[Tensor]:
    """Features of one shape in one storage order: the very same tensors if they share one already, else
    contiguous copies.
    """
    # A list, not a generator: where a backward pass reads a tensor's layout, Dynamo starts it again, and torch 2.14 and
    # 2.15 then take a generator left in the middle for one that still runs.
    contiguous = all([f.is_contiguous() for f in features])  # noqa: C419
    if contiguous or walk_as_they_lie([Layout.of(f) for f in features], leading):
        return list(features)
    return [f.contiguous() for f in features]


def with_layout(grad: Tensor, layout: Layout) -> Tensor:
    """`grad` in the strides of its feature, where those are dense."""
    if grad.stride() == layout.strides or layout.storage_order is None:
        return grad
    return torch.empty_strided(layout.shape, layout.strides, dtype=grad.dtype, device=grad.device).copy_(grad)
