"""Who takes up the constants of channels that leave: the bias of the reader, or a constant channel that stays.

A constant v_i behind a zero-padded convolution is no bias, but every constant channel has the same shape
there: v_i W[:, i] = v_j (v_i / v_j) W[:, i]. So one channel j that stays, the *carrier*, can do the work of all:
W'[:, j] = W[:, j] + sum_i (v_i / v_j) W[:, i], exactly, whatever the padding, the stride or the kernel.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .analysis import Analysis, Read

# The largest v_i / v_j. The largest v_j is preferred anyway; far smaller ones may be what rounding left of 0.
LARGEST_FACTOR = 1024.0

Located = tuple[Read, Tensor, Tensor]  # a read, the channels of its inputs, those of its outputs


class Merged(NamedTuple):
    """Inputs of a read that leave, those that carry their constants, and v_i / v_j."""

    read: Read
    inputs: Tensor
    onto: Tensor
    factor: Tensor


class Waiting(NamedTuple):
    """Constants that leave a read, and that no channel which stays carries yet."""

    read: Read
    inputs: Tensor  # channels
    blocked: Tensor  # bool per input


def absorbing_reads(analysis: Analysis) -> dict[int, Tensor]:
    """For each read the inputs whose constants the bias may take up, looking at all users of that bias.

    A layer that is called twice has one bias: it can take up only what is the same constant in both calls. A
    bias that something else uses as well cannot change at all.
    """
    by_bias: dict[tuple[str, int], list[Read]] = defaultdict(list)
    sites: Counter[str] = Counter()
    for read in analysis.reads:
        if read.bias is not None:
            by_bias[read.bias.name, read.bias.offset].append(read)
            sites[read.bias.name] += read.bias.offset == 0
    users = _users(analysis)
    result = {id(r): r.absorbable.clone() for r in analysis.reads}
    for (name, _), reads in by_bias.items():
        target = reads[0].bias
        assert target is not None
        exclusive = not target.exists or users[name] == sites[name]
        same = _same_constants(reads) & exclusive
        for read in reads:
            same &= read.absorbable
        for read in reads:
            result[id(read)] = same
    # A weight with several biases: what one of them cannot take up goes into the weight, for all of them.
    for reads in _by_weight(analysis.reads).values():
        common = torch.stack([result[id(r)] for r in reads]).all(0)
        result.update({id(r): common for r in reads})
    return result


class Carriers:
    """Which constants of which reads another channel can carry, and which channels should."""

    def __init__(self, analysis: Analysis, reads: Sequence[Located], absorbing: dict[int, Tensor]) -> None:
        self.mergeable = _mergeable(analysis)
        count = 1 + max((int(i.max()) for _, i, _ in reads if i.numel()), default=0)
        self._reach = torch.zeros(count, dtype=torch.float32)  # at how many reads the channel could carry
        for read, inputs, _ in reads:
            able = self.mergeable[id(read)] & ~absorbing[id(read)]
            self._reach.index_add_(0, inputs, able.float())

    def waiting(self, read: Read, inputs: Tensor, blocked: Tensor, removed: Tensor) -> Tensor:
        """Which of the `blocked` constants no channel that stays can carry."""
        carriers = self.mergeable[id(read)] & ~removed[inputs]
        if not bool(carriers.any()):
            return blocked
        most = float(read.value[carriers].abs().max()) * LARGEST_FACTOR
        return blocked & (~self.mergeable[id(read)] | (read.value.abs() > most))

    def choose(self, waiting: Sequence[Waiting], candidates: Tensor) -> dict[int, Waiting]:
        """Which of the `candidates` (bool per channel) stay as carriers -> a read that needs it. Few serve all: each
        time the one that serves most reads, then the one that could serve most others, then the largest constant."""
        able = [self._able(entry, candidates) for entry in waiting]
        channels = torch.cat([c for c, _ in able])
        sizes = torch.cat([s for _, s in able])
        entries = torch.repeat_interleave(torch.arange(len(able)), torch.tensor([len(c) for c, _ in able]))
        chosen: dict[int, Waiting] = {}
        while len(entries):
            served = torch.zeros_like(self._reach).index_add_(0, channels, torch.ones_like(sizes))
            least = torch.full_like(self._reach, torch.inf).scatter_reduce_(0, channels, sizes, "amin")
            most = served == served.max()
            most &= self._reach == self._reach[most].max()
            channel = int(torch.where(most, least, -1.0).argmax())
            with_it = entries[channels == channel]
            chosen[channel] = waiting[int(with_it[0])]
            rest = ~torch.isin(entries, with_it)
            channels, sizes, entries = channels[rest], sizes[rest], entries[rest]
        return chosen

    def _able(self, entry: Waiting, among: Tensor) -> tuple[Tensor, Tensor]:
        """The channels that could carry all constants that wait, and their size relative to the largest."""
        size = entry.read.value.abs()
        size = (size / size[entry.blocked].max()).float()
        able = self.mergeable[id(entry.read)] & among[entry.inputs] & (size * LARGEST_FACTOR >= 1)
        channels, position = entry.inputs[able].unique(return_inverse=True)  # the same one can be there twice
        least = torch.full((len(channels),), torch.inf, dtype=size.dtype)
        least.scatter_reduce_(0, position, size[able], "amin")
        return channels, least

    def assign(self, read: Read, inputs: Tensor, carried: Tensor, removed: Tensor) -> Merged:
        """The largest constant that stays carries all."""
        sizes = torch.where(self.mergeable[id(read)] & ~removed[inputs], read.value.abs(), 0.0)
        carrier = sizes.argmax()
        source = carried.nonzero().flatten()
        return Merged(read, source, carrier.expand_as(source), read.value[source] / read.value[carrier])


def _mergeable(analysis: Analysis) -> dict[int, Tensor]:
    """For each read the inputs that are constants other than 0 and whose weights may be merged: the weight is a
    parameter, and nothing else reads it but layers of the same kind that find the same constants."""
    users = _users(analysis)
    result = {id(r): torch.zeros_like(r.live) for r in analysis.reads}
    kinds: dict[str, dict[object, set[_Key]]] = defaultdict(lambda: defaultdict(set))
    by_weight = _by_weight(analysis.reads)
    for key, reads in by_weight.items():
        for read in reads:
            kinds[key.name][read.node].add(key)
    for key, reads in by_weight.items():
        sites = list(kinds[key.name].values())
        if users[key.name] == len(sites) and all(site == sites[0] for site in sites):
            able = _same_constants(reads) & ~reads[0].live & (reads[0].value != 0)
            result.update({id(r): able for r in reads})
    return result


class _Key(NamedTuple):
    """A weight, or one group of it, as one kind of layer reads it."""

    name: str
    dim: int
    start: int
    inputs: int


def _by_weight(reads: Sequence[Read]) -> dict[_Key, list[Read]]:
    result: dict[_Key, list[Read]] = defaultdict(list)
    for read in reads:
        if read.weight is not None:
            key = _Key(read.weight.name, read.weight.dim, read.start, read.inputs.numel())
            result[key].append(read)
    return result


def _same_constants(reads: Sequence[Read]) -> Tensor:
    first = reads[0]
    same = torch.ones_like(first.live)
    for read in reads[1:]:
        same &= (read.value == first.value) & (read.live == first.live)
    return same


def _users(analysis: Analysis) -> Counter[str]:
    users: Counter[str] = Counter()
    for node, name in analysis.graph.tensor_names.items():
        users[name] += len(node.users)
    return users
