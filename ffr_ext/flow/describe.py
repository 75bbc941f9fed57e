"""What a FeatureFlow will do, before any training: its layers, their shapes, the stages and the terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..stages import has_term, make_plan


@dataclass(frozen=True)
class Description:
    """Returned by :meth:`FeatureFlow.describe`; its string is a table.

    Attributes:
        names, shapes, dtypes: of every captured feature, in call order; of several paths, path after path.
        stages: for each stage that has a term, the indices of its own features.
        gradient, curvature: for each term in depth order, the indices of the two or three features it compares.
        settings: norm, curvature_kind, reduction, transition, backend and both weights.
        bytes: of all features.
    """

    names: list[str]
    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]
    stages: list[list[int]]
    gradient: list[tuple[int, ...]]
    curvature: list[tuple[int, ...]]
    settings: dict[str, Any] = field(repr=False)
    bytes: int

    def __str__(self) -> str:
        stage_of = {index: number for number, stage in enumerate(self.stages) for index in stage}
        width = max(len(name) for name in self.names)
        lines = [f"{'#':>3}  {'layer':{width}}  {'shape':20}  {'dtype':8}  stage"]
        for index, (name, shape, dtype) in enumerate(zip(self.names, self.shapes, self.dtypes, strict=True)):
            text = "x".join(map(str, shape))
            kind = str(dtype).removeprefix("torch.")
            lines.append(
                f"{index:3}  {name:{width}}  {text:20}  {kind:8}  {stage_of.get(index, '- (no term)')}"
            )
        for kind, terms in (("gradient", self.gradient), ("curvature", self.curvature)):
            text = ", ".join("-".join(map(str, term)) for term in terms) or "none"
            number = f"{len(terms)} {kind} term" + "s" * (len(terms) != 1)
            lines.append(f"{number}, weight {_weight(self.settings[kind])}: {text}")
        lines.append(
            ", ".join(f"{k} {v}" for k, v in self.settings.items() if k not in ("gradient", "curvature"))
        )
        lines.append(f"features: {self.bytes / 2**20:.2f} MiB")
        return "\n".join(lines)


def _weight(weight: Any) -> str:
    return f"{weight:g}" if isinstance(weight, (int, float)) else str(weight)


def describe(
    paths: Sequence[tuple[list[str], Sequence[Tensor]]], transition: str, settings: dict[str, Any]
) -> Description:
    """What a loss compares whose paths have features captured from layers of these names."""
    names = [name for names, _ in paths for name in names]
    features = [feature for _, features in paths for feature in features]
    gradient: list[tuple[int, ...]] = []
    curvature: list[tuple[int, ...]] = []
    stages = []
    before = 0
    with_terms = any(has_term(features, transition) for _, features in paths)
    for _, own in paths:
        shapes = [tuple(feature.shape) for feature in own]
        # If no path has a term, the first says why.
        plan = make_plan(shapes, transition) if has_term(own, transition) or not with_terms else None
        for stage in plan.stages if plan is not None else ():
            start, stop = before + stage.first - stage.tail, before + stage.first + stage.own
            stages.append(list(range(start + stage.tail, stop)))
            gradient += [(i, i + 1) for i in range(start + stage.counted_by_earlier, stop - 1)]
            curvature += [(i, i + 1, i + 2) for i in range(start, stop - 2)]
        before += len(own)
    return Description(
        names=names,
        shapes=[tuple(feature.shape) for feature in features],
        dtypes=[feature.dtype for feature in features],
        stages=stages,
        gradient=gradient,
        curvature=curvature,
        settings=settings,
        bytes=sum(feature.numel() * feature.element_size() for feature in features),
    )
