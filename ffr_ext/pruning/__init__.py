"""Structured pruning: which filters are dead (`sparsity`), making them so (`zero_small_filters`), taking them
out (`compact`).

`graph/` knows what a channel is and which must leave together, `surgery/` cuts the tensors, plans and optimizers.
"""

from __future__ import annotations

from .budget import prune_to
from .compaction import Compaction, compact
from .graph import ChannelGroup, ChannelGroups, channel_groups
from .norms import filter_norms
from .sparsity import LayerSparsity, SparsityReport, sparsity
from .surgery.gather import compact_filters
from .surgery.plan import CompactionPlan
from .synthesis import Synthesis, synthesize
from .zero import zero_small_filters

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "Compaction",
    "CompactionPlan",
    "LayerSparsity",
    "SparsityReport",
    "Synthesis",
    "channel_groups",
    "compact",
    "compact_filters",
    "filter_norms",
    "prune_to",
    "sparsity",
    "synthesize",
    "zero_small_filters",
]
