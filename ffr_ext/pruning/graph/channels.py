"""Channels that must leave together: labels on the dimensions of tensors, and the sets they form.

Every index of every dimension of every parameter and buffer gets a label of its own. The labels travel with
the data through the graph: a convolution's output channels carry the labels of its filters, an addition makes
the labels of its two operands one. What is one label in the end is one channel of the network: it is cut from
all tensors or from none.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ChannelSets:
    """Labels, the equalities between them, and why some may not be cut."""

    def __init__(self) -> None:
        self._count = 0
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._claims: list[Tensor] = []
        self._pins: list[tuple[Tensor, str]] = []

    def __len__(self) -> int:
        """Labels so far."""
        return self._count

    def new(self, size: int) -> Tensor:
        """`size` labels that nothing else carries."""
        self._count += size
        return torch.arange(self._count - size, self._count)

    def new_pinned(self, size: int, reason: str) -> Tensor:
        labels = self.new(size)
        self.claim(labels)
        self.pin(labels, reason)
        return labels

    def claim(self, labels: Tensor | None) -> None:
        """A rule knows what these indices mean. Labels that nobody claims stay: they are no channels (a
        kernel's width), or belong to a tensor the graph does not use."""
        if labels is not None:
            self._claims.append(labels)

    def unify(self, a: Tensor, b: Tensor) -> None:
        """a[i] and b[i] are the same channel."""
        self.claim(a)
        self.claim(b)
        self._left.append(a)
        self._right.append(b)

    def pin(self, labels: Tensor | None, reason: str) -> None:
        """These channels must stay. The first reason given for a channel is the one reported."""
        if labels is not None:
            self._pins.append((labels, reason))

    def resolve(self) -> ResolvedSets:
        """The connected components of the labels."""
        root = torch.arange(self._count)
        if self._left:
            left, right = torch.cat(self._left), torch.cat(self._right)
            while True:  # every label takes the least label among its neighbours, then follows it to its end
                least = torch.minimum(root[left], root[right])
                new = root.clone()
                new.scatter_reduce_(0, root[left], least, "amin")
                new.scatter_reduce_(0, root[right], least, "amin")
                new.scatter_reduce_(0, left, least, "amin")
                new.scatter_reduce_(0, right, least, "amin")
                while not torch.equal(new[new], new):
                    new = new[new]
                if torch.equal(new, root):
                    break
                root = new
        unique, channel_of = root.unique(return_inverse=True)
        claimed = torch.zeros(self._count, dtype=torch.bool)
        if self._claims:
            claimed[torch.cat(self._claims)] = True
        pinned = torch.zeros(len(unique), dtype=torch.bool)
        reason = torch.full((len(unique),), -1)
        reasons = ["not the channels of any layer of the traced graph"]
        pins = [*self._pins, (torch.arange(self._count)[~claimed], reasons[0])]
        for labels, text in pins:
            channels = channel_of[labels]
            fresh = channels[~pinned[channels]]
            reason[fresh] = len(reasons)
            pinned[channels] = True
            reasons.append(text)
        return ResolvedSets(channel_of, pinned, reason, reasons)


class ResolvedSets:
    """The channels of a network: which label belongs to which, which are pinned and why."""

    def __init__(self, channel_of: Tensor, pinned: Tensor, reason: Tensor, reasons: list[str]) -> None:
        self.channel_of = channel_of
        self.pinned = pinned
        self._reason = reason
        self._reasons = reasons

    def __len__(self) -> int:
        return self.pinned.numel()

    def pin_reason(self, channel: int) -> str:
        return self._reasons[int(self._reason[channel])]
