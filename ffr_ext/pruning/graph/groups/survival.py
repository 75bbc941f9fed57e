"""Who survives a generation: the probabilities of channels and synapses in evolutionary synthesis, and the draws.

StressedNets (Shafiee et al.) and its predecessors say in words that a synapse's or cluster's strength decides; the
formulas are our reading of them and of third-party code, the paper's own are not known to us.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...norms import filter_norms
from .channel_groups import ChannelGroups
from .shards import Local, max_over_ranks
from .slices import Axis

LEVELS = ("channel", "synapse")


def channel_survival(groups: ChannelGroups, environment: float) -> Tensor:
    """(groups,) in float64 on the CPU: ``environment * exp(S / Z - 1)``, Z the largest S of the layer.

    S is the effective scale of a channel with norms (``|gamma| sqrt(var / (var + eps))``, the root of the sum of
    squares over its norms), since the size of its filters means nothing there; else the root of its energy.
    """
    strength = channel_strength(groups).sqrt()
    largest = torch.zeros_like(strength).scatter_reduce(0, groups.families, strength, "amax")[groups.families]
    ratio = torch.where(largest == 0, 0.0, strength / largest)
    return (environment * torch.exp(ratio - 1)).clamp(max=1)


def channel_strength(groups: ChannelGroups) -> Tensor:
    """S squared of every group, see `channel_survival`. ValueError where it is not finite."""
    energies = groups.energies(include_norm=False).double().cpu()
    axes, behind = scale_axes(groups)
    if axes:
        parts = groups.local([axis.name for axis in axes])
        gammas = filter_norms([part.tensor for part in parts], 2, 0)
        values = [
            gamma.double() * _deviation_share(groups.owner(axis.name), part, gamma)
            for gamma, axis, part in zip(gammas, axes, parts, strict=True)
        ]
        scales = groups.sums_of_squares(axes, parts, values).cpu()
        energies = torch.where(behind, scales, energies)
    if not bool(energies.isfinite().all()):
        group = int((~energies.isfinite()).nonzero()[0])
        raise ValueError(
            f"model: the strength of channel group {group} is {float(energies[group])}; weights must be finite"
        )
    return energies


def scale_axes(groups: ChannelGroups) -> tuple[list[Axis], Tensor]:
    """The scales of norms, and which groups have one: (groups,) bool."""
    axes = [axis for axis in groups.axes if axis.role == "scale"]
    behind = torch.zeros(len(groups), dtype=torch.bool, device="cpu")
    for axis in axes:
        behind[axis.groups[axis.groups >= 0]] = True
    return axes, behind


def _deviation_share(norm: Any, part: Local, gamma: Tensor) -> Tensor | float:
    """sqrt(var / (var + eps)) of a batch norm on this rank's rows; 1 for norms without running statistics."""
    variance = getattr(norm, "running_var", None)
    if variance is None:
        return 1.0
    own = variance.detach().double().narrow(0, part.first_row, gamma.numel())
    share: Tensor = (own / (own + norm.eps)).sqrt()
    return share


def draw_channels(groups: ChannelGroups, environment: float, generator: torch.Generator) -> Tensor:
    """(groups,) bool on the CPU: who survives. Of every layer at least the strongest does (ours)."""
    survival = channel_survival(groups, environment)
    chance = torch.rand(len(groups), generator=_fresh(generator), dtype=torch.float64, device="cpu")
    alive = chance < survival
    for family in range(int(groups.families.max()) + 1):
        members = (groups.families == family).nonzero().flatten()
        if not bool(alive[members].any()):
            alive[members[survival[members].argmax()]] = True
    return alive


def draw_synapses(
    parts: Sequence[Local], shapes: Sequence[Sequence[int]], environment: float, generator: torch.Generator
) -> list[Tensor]:
    """For each weight a bool for each entry of its part on this rank: ``environment * exp(|w| / Z - 1)`` likely, Z the
    largest |w| of the weight. What is 0 is dead and stays so."""
    largest = [
        part.tensor.abs().amax() if part.tensor.numel() else part.tensor.new_zeros(()) for part in parts
    ]
    tops = max_over_ranks(torch.stack([v.double().to(largest[0].device) for v in largest]), parts).cpu()
    if not bool(tops.isfinite().all()):
        raise ValueError("model: a weight is not finite, so nothing can be said of its synapses' strength")
    alive = []
    fresh = _fresh(generator)
    for part, shape, top in zip(parts, shapes, tops.tolist(), strict=True):
        chance = torch.rand(tuple(shape), generator=fresh, device="cpu")
        chance = chance.narrow(0, part.first_row, part.tensor.shape[0]).to(part.tensor.device)
        magnitude = part.tensor.abs().float()
        likely = environment * torch.exp(magnitude / (top or 1.0) - 1)
        alive.append((chance < likely) & (part.tensor != 0))
    return alive


def _fresh(generator: torch.Generator) -> torch.Generator:
    """A generator of a stream of its own. Seeded like the one that initialised the weights, `generator` itself would
    draw the very numbers that the weights were made of: of a uniform weight 43 % survived, where 64 % should."""
    return torch.Generator("cpu").manual_seed(
        int(torch.randint(2**62, (), generator=generator, device="cpu"))
    )


def check_generator(generator: Any) -> torch.Generator:
    """One of the CPU's, so that every device and rank draws the same; a fresh one of seed 0 for None."""
    if generator is None:
        return torch.Generator("cpu").manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(
            f"generator: expected one of the CPU, which draws the same everywhere, got {generator.device}"
        )
    return generator


def check_environment(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"environment: expected a number, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"environment: expected a finite number above 0, got {value!r}")
    return float(value)
