"""Structured pruning: which filters are dead (`sparsity`), making them so (`zero_small_filters`), taking them
out (`compact`).

Submodules load when a name is first used, because `compact` needs `torch.export`, which is slow to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compaction import Compaction, compact
    from .counting import SparsityReport, sparsity
    from .gather import compact_filters
    from .norms import filter_norms
    from .plan import CompactionPlan
    from .zeroing import zero_small_filters

# No submodule carries the name of a public function: importing it would hide the function.
_HOMES = {
    "filter_norms": "norms",
    "compact_filters": "gather",
    "sparsity": "counting",
    "SparsityReport": "counting",
    "zero_small_filters": "zeroing",
    "compact": "compaction",
    "Compaction": "compaction",
    "CompactionPlan": "plan",
}

__all__ = [
    "Compaction",
    "CompactionPlan",
    "SparsityReport",
    "compact",
    "compact_filters",
    "filter_norms",
    "sparsity",
    "zero_small_filters",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
