"""Structured pruning: which filters are dead (`sparsity`), making them so (`zero_small_filters`), taking them
out (`compact`).

`graph/` knows what a channel is and which must leave together, `surgery/` cuts the tensors, plans and optimizers.
"""

from __future__ import annotations

from .compaction import Compaction, compact
from .norms import filter_norms
from .sparsity import LayerSparsity, SparsityReport, sparsity
from .surgery.gather import compact_filters
from .surgery.plan import CompactionPlan
from .zero import zero_small_filters

__all__ = [
    "Compaction",
    "CompactionPlan",
    "LayerSparsity",
    "SparsityReport",
    "compact",
    "compact_filters",
    "filter_norms",
    "sparsity",
    "zero_small_filters",
]
