"""Channel groups: every slice of every tensor that leaves with a channel, and what is known of a group as a whole.

`channel_groups` finds them, `slices` sums over them, `shards` knows which rows FSDP2 holds here, `costs` counts FLOPs
and parameters from channel counts, `greedy` chooses who leaves for a budget, `survival` draws who lives on.
"""

from __future__ import annotations

from .channel_groups import SCOPES, ChannelGroup, ChannelGroups, channel_groups, groups_of

__all__ = ["SCOPES", "ChannelGroup", "ChannelGroups", "channel_groups", "groups_of"]
