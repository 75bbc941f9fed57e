"""`OutInChannelLasso`: what makes a channel and what reads it, penalised as one group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..pruning.graph.groups import ChannelGroups, channel_groups
from ..pruning.graph.groups.slices import Axis, Slices
from .penalty import GroupPenalty, check_regularizes_something


class OutInChannelLasso(GroupPenalty):
    """``scale * weight * sum_c sqrt(E_c)``, E_c the sum of squares of all slices of channel c.

    Out-in-channel sparsity regularization (Li, Qi, Wang, Ge, Li, Yue, Sun; CVPR 2019). The paper's words say which
    slices form a group: a filter of one layer and the channel of the next layer that reads it. The formula is our
    reading of them. A weight between two regularised channels is in two groups, and gets the gradients of both::

        G[o, i, k] += W[o, i, k] * weight * (1 / sqrt(E_out[o]) + 1 / sqrt(E_in[i]))

    Networks with ReLU compute the same if a filter is multiplied by a and what reads it divided by a. The group norm is
    least where both halves are as large as each other, and then measures their product; the penalty of filters alone
    (``separated=True``) can be dodged by moving scale into the next layer. (That remark is ours.)

    Args:
        model: any module that `channel_groups` can trace; wrap it afterwards.
        example_inputs: a tensor, a tuple of positional or a dict of keyword inputs.
        weight: a finite number of at least 0. The paper's value is not known to us; 1e-4 to 1e-2 is a range to search.
        scope: ``"inner"`` or ``"all"``, see `channel_groups`.
        separated: penalise the filters alone, the paper's baseline.
        include_norm: the squares of norms' scales belong to E. What the paper does with batch norm is not known to us.

    Raises:
        TypeError, ValueError: an argument is not as above, the model cannot be traced, or no channel may leave it (the
            message says why).
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        weight: float,
        scope: str = "inner",
        separated: bool = False,
        include_norm: bool = False,
    ) -> None:
        for name, flag in (("separated", separated), ("include_norm", include_norm)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name}: expected True or False, got {flag!r}")
        self.groups = channel_groups(model, example_inputs, scope)
        axes = self.groups.weight_axes(include_norm, separated)
        check_channels("OutInChannelLasso", self.groups)
        slices = Slices(model, axes, len(self.groups))
        alike = torch.ones(len(self.groups), device="cpu")
        super().__init__(model, slices, alike, families(self.groups, axes), weight=weight)


def check_channels(name: str, groups: ChannelGroups) -> None:
    """ValueError for a model without a channel that may leave, which says why none may."""
    reasons = [f"{count} filters stay: {reason}" for reason, count in groups.pinned.items()]
    reasons += [f"{what} is an op that is not known here" for what in groups.unknown]
    check_regularizes_something(name, len(groups), "no channel may leave it; " + "; ".join(reasons[:5]))


def families(groups: ChannelGroups, axes: list[Axis]) -> dict[str, Tensor]:
    """The groups of each family, named after the first weight that makes its channels."""
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for axis in axes:
        members = axis.groups[axis.groups >= 0]
        if not axis.makes_channels:
            continue
        family = int(groups.families[members[0]])
        if family not in known:
            known.add(family)
            found[axis.name.removesuffix(".weight")] = (groups.families == family).nonzero().flatten()
    return found
