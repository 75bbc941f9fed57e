"""Neighbours of feature flow regularization: penalties of weights, and the protocol that all of them follow."""

from __future__ import annotations

from .base import BaseRegularizer, Regularizer
from .group_lasso import SparseGroupLasso
from .oicsr import OutInChannelLasso
from .prox import prox
from .scale_lasso import ScaleLasso
from .stress import Stress

__all__ = [
    "BaseRegularizer",
    "OutInChannelLasso",
    "Regularizer",
    "ScaleLasso",
    "SparseGroupLasso",
    "Stress",
    "prox",
]
