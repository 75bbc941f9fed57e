"""The settings of the penalty that are not weights: checked once, passed as one, usable as a key."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks
from .backends import BACKENDS

NORMS = ("l1", "l2_squared", "l2")
CURVATURE_KINDS = ("difference", "angle")
REDUCTIONS = ("mean", "batchmean", "sum")
TRANSITIONS = ("break", "pool")


@dataclass(frozen=True)
class FlowOptions:
    """What the keywords of `ffr_loss` mean is said there. ValueError for a value that is none of the choices."""

    norm: str = "l1"
    curvature_kind: str = "difference"
    reduction: str = "mean"
    transition: str = "break"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("norm", self.norm, NORMS),
            ("curvature_kind", self.curvature_kind, CURVATURE_KINDS),
            ("reduction", self.reduction, REDUCTIONS),
            ("transition", self.transition, TRANSITIONS),
            ("backend", self.backend, ("auto", *BACKENDS)),
        ):
            if value not in choices:
                checks.check_choice(name, value, choices)

    @property
    def squared(self) -> bool:
        """Whether the norm is made of squares rather than of absolute values."""
        return self.norm != "l1"

    @property
    def per_sample(self) -> bool:
        """Whether the norm is taken of each sample's difference by itself."""
        return self.norm == "l2"

    @property
    def angles(self) -> bool:
        """Whether curvature terms are angles."""
        return self.curvature_kind == "angle"
