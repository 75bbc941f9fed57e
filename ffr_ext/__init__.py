"""Feature flow regularization: fused difference norms of features, exact removal of dead filters.

>>> from ffr_ext import ffr_loss
>>> loss = task_loss + 3.0 * ffr_loss(features)          # features: list of tensors in depth order

Importing this package touches no device and imports neither triton nor torch.export; what needs them loads at
its first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import show_config
    from .flow import FeatureFlow
    from .functional import FlowTerms, ffr_loss, flow_terms
    from .pruning import (
        Compaction,
        CompactionPlan,
        SparsityReport,
        compact,
        compact_filters,
        filter_norms,
        sparsity,
        zero_small_filters,
    )
    from .verification import selftest

# Where each public name lives, imported when it is first asked for.
_HOMES = {
    "ffr_loss": "functional",
    "flow_terms": "functional",
    "FlowTerms": "functional",
    "FeatureFlow": "flow",
    "filter_norms": "pruning",
    "compact_filters": "pruning",
    "sparsity": "pruning",
    "SparsityReport": "pruning",
    "zero_small_filters": "pruning",
    "compact": "pruning",
    "Compaction": "pruning",
    "CompactionPlan": "pruning",
    "show_config": "config",
    "selftest": "verification",
}

__all__ = [
    "Compaction",
    "CompactionPlan",
    "FeatureFlow",
    "FlowTerms",
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


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ffr_ext' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
