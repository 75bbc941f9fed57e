"""What a channel is: the channels of every tensor of a model, what is known of them, and which leave together.

Usable without `compact`. Reading order: `trace` (the exported graph; `inline`, `packed` and `experts` give it a form
that can be walked), `channels` (labels and their unions), `states` (live or constant), `constants` (who takes them up),
`analysis` (one walk, with a rule for each op from `rules/`), `solver` (the largest set of channels that may leave),
`branches` (modules that are dead as a whole), `groups` (every slice that leaves with a channel).
"""

from __future__ import annotations

from .analysis import Analysis
from .groups import ChannelGroup, ChannelGroups, channel_groups
from .rules import (  # noqa: F401  they fill the table of rules
    attention,
    contractions,
    layers,
    norms,
    pointwise,
    rearrange,
    recurrent,
    routing,
    shape,
    split,
)
from .solver import Options, Solver
from .trace import TracedGraph, trace

__all__ = [
    "Analysis",
    "ChannelGroup",
    "ChannelGroups",
    "Options",
    "Solver",
    "TracedGraph",
    "channel_groups",
    "trace",
]
