"""Feature flow regularization: fused difference norms of features, exact removal of dead filters.

>>> from ffr_ext import ffr_loss
>>> loss = task_loss + 3.0 * ffr_loss(features)          # features: list of tensors in depth order

Importing this package touches no device and does not import triton.
"""

from __future__ import annotations

__version__ = "0.1.0.dev0"

from .env import show_config
from .flow import FeatureFlow
from .functional import FFRLoss, FlowTerms, ffr_loss, flow_terms
from .pruning import (
    Compaction,
    CompactionPlan,
    LayerSparsity,
    SparsityReport,
    compact,
    compact_filters,
    filter_norms,
    sparsity,
    zero_small_filters,
)
from .selftest import selftest

__all__ = [
    "Compaction",
    "CompactionPlan",
    "FFRLoss",
    "FeatureFlow",
    "FlowTerms",
    "LayerSparsity",
    "SparsityReport",
    "__version__",
    "compact",
    "compact_filters",
    "ffr_loss",
    "filter_norms",
    "flow_terms",
    "selftest",
    "show_config",
    "sparsity",
    "zero_small_filters",
]
