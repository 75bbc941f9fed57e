"""`channel_groups`: which channels of a model may leave, and every slice of every tensor that leaves with each.

What structured penalties penalise, budgets rank and syntheses draw. Needs the graph alone, not `compact`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor, nn

from .... import _torch
from ....checks import check_choice
from ....models import as_call, find_wrapper
from ...norms import filter_norms
from ..analysis import Analysis
from ..solver import Options, Solver
from ..states import on_cpu
from ..trace import TracedGraph, op_name, trace_copy
from .slices import Axis, Slices

SCOPES = ("inner", "all")

# Norms whose scale belongs to one channel each; a layer norm's channels are pinned anyway.
_NORMS = {"batch_norm", "instance_norm", "group_norm"}


@dataclass(frozen=True)
class ChannelGroup:
    """One channel: everything that leaves when it leaves.

    Attributes:
        slices: (name of a parameter or buffer, dimension, index), in the order of the model's tensors. The input
            channels of a grouped convolution are no slices of its weight and are left out.
        family: The number of its layer: channels of one layer, and of layers that an addition couples, share it.
    """

    slices: list[tuple[str, int, int]]
    family: int


class ChannelGroups(Slices):
    """The channels of ``model`` that may leave, in a fixed order; see `channel_groups`.

    Tensors are looked up by name at every call, so what ``fully_shard`` or ``.to()`` does later is seen.

    Attributes:
        scope: ``"inner"`` or ``"all"``.
        axes: Every `Axis` that holds a channel of a group.
        families: The family of every group, a 1-D int64 tensor.
        unknown: Ops that are not known here ("op in module" -> how often): the channels that they touch are in no
            group.
        pinned: Why filters are in no group -> how many.
    """

    def __init__(
        self,
        model: nn.Module,
        scope: str,
        axes: list[Axis],
        families: Tensor,
        unknown: Mapping[str, int],
        pinned: Mapping[str, int],
    ) -> None:
        super().__init__(model, axes, families.numel())
        self.scope = scope
        self.families = families
        self.unknown = dict(unknown)
        self.pinned = dict(pinned)

    @overload
    def __getitem__(self, index: int) -> ChannelGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[ChannelGroup]: ...
    def __getitem__(self, index: int | slice) -> ChannelGroup | list[ChannelGroup]:
        return self._members[index]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self._members)

    def __repr__(self) -> str:
        text = (
            f"{len(self)} channel groups in {self.families.unique().numel()} families, scope {self.scope!r}"
        )
        return f"{text}; unknown ops: {', '.join(self.unknown)}" if self.unknown else text

    @cached_property
    def _members(self) -> list[ChannelGroup]:
        slices: list[list[tuple[str, int, int]]] = [[] for _ in range(len(self))]
        for axis in self.axes:
            for index, group in enumerate(axis.groups.tolist()):
                if group >= 0:
                    slices[group].append((axis.name, axis.dim, index))
        return [ChannelGroup(s, f) for s, f in zip(slices, self.families.tolist(), strict=True)]

    def weight_axes(self, include_norm: bool = True, separated: bool = False) -> list[Axis]:
        """The axes that `energies` sums over: of weights, and of norms' scales."""
        roles = {"out", *([] if separated else ["in"]), *(["scale"] if include_norm else [])}
        return [axis for axis in self.axes if axis.role in roles]

    def energies(self, include_norm: bool = True, separated: bool = False) -> Tensor:
        """The sum of squares of every group over all its slices of weights and scales of norms, without biases.

        Equal to, for each group::

            sum((tensors[name].select(dim, index).float() ** 2).sum() for name, dim, index in group.slices
                if name is a convolution's, linear layer's or norm's weight)

        summed in float64, with one launch for all tensors of a device.

        Args:
            include_norm: With the squares of the norms' scales.
            separated: Without the slices that read the channel: the filters that make it alone.

        Returns:
            (groups,), on the device of the weights, float64 for float64 weights, else float32. Not differentiable. A
            NaN weight makes its groups NaN. Under FSDP2 the sums are over the shards of all ranks.
        """
        axes = self.weight_axes(include_norm, separated)
        local = self.local([axis.name for axis in axes])
        norms = filter_norms([part.tensor for part in local], 2, [axis.dim for axis in axes])
        total = self.sums_of_squares(axes, local, norms)
        return total.to(
            torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
        )

    def layers(self) -> list[Axis]:
        """The filters of every weight that makes channels of some group."""
        return [axis for axis in self.axes if axis.makes_channels]

    @on_cpu
    @torch.no_grad()
    def zero_(self, chosen: Tensor, model: nn.Module | None = None) -> None:
        """Zero what makes the chosen groups: filters, scales, biases and running means. What reads them stays.

        Args:
            chosen: (groups,) bool.
            model: Where to, by the names of tensors; None: the model of the groups.
        """
        owner = (
            self
            if model is None
            else ChannelGroups(model, self.scope, list(self.axes), self.families, {}, {})
        )
        tensors = owner.tensors()
        for axis in self.axes:
            indices = ((axis.groups >= 0) & chosen.cpu()[axis.groups]).nonzero().flatten()
            tensor = tensors[axis.name]
            statistic = not isinstance(tensor, nn.Parameter) and not axis.name.endswith("running_mean")
            if axis.role != "in" and not statistic and indices.numel():
                tensor.index_fill_(axis.dim, indices.to(tensor.device), 0)


def channel_groups(model: nn.Module, example_inputs: Any, scope: str = "inner") -> ChannelGroups:
    """The channels of a model that may leave it, and what leaves with each.

    The model is traced with ``torch.export`` in eval mode, as `compact` does, and not changed::

        groups = channel_groups(model, torch.randn(1, 3, 32, 32))
        groups.energies()          # one number for each channel
        groups[0].slices           # [("stem.0.weight", 0, 5), ("stem.1.weight", 0, 5), ..., ("head.weight", 1, 5)]

    Channels that have to stay are in no group: outputs of the model, what attention or a layer norm mixes, what an op
    that is not known here touches, computed weights (weight_norm).

    Args:
        model: Any module that ``torch.export`` can trace, not wrapped (DDP, FSDP, ``torch.compile``): make the groups
            first, then wrap.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs.
        scope: ``"inner"``: channels that exactly one weight makes. A depthwise convolution passes channels on and
            makes none. ``"all"``: also those that additions (or products) of several layers' outputs couple.

    Returns:
        `ChannelGroups`: ``len()``, indexing, ``.energies()``; empty where nothing may leave.

    Raises:
        TypeError: ``model`` is no module, or ``example_inputs`` no inputs.
        ValueError: an unknown scope, a wrapped model, or one that cannot be traced (with torch's reason and op).
    """
    check_choice("scope", scope, SCOPES)
    wrapper = find_wrapper(model, "channel_groups")
    if wrapper is not None:
        raise ValueError(
            f"channel_groups: the model is wrapped in {wrapper[0]}{wrapper[1]}; make the groups of the plain model "
            "first, then wrap it: they see what becomes of its tensors"
        )
    args, kwargs = as_call(example_inputs)
    solver = Solver(Analysis(trace_copy(model, args, kwargs), strict=True), Options())
    return groups_of(model, solver, scope)


@on_cpu
def groups_of(model: nn.Module, solver: Solver, scope: str) -> ChannelGroups:
    """The groups of a model whose trace has been solved; the solver may be that of a copy."""
    analysis, channel_of = solver.analysis, solver.sets.channel_of
    roles = _Roles(analysis)
    producers = torch.zeros(len(solver.sets), dtype=torch.int64)
    for name, dim in roles.produced:
        producers[solver.axes[name, dim].unique()] += 1
    for labels in analysis.filters_of_computed:  # pinned; what they are added to is not theirs alone
        producers[channel_of[labels]] += 1
    chosen = ~solver.sets.pinned & (producers == 1 if scope == "inner" else producers >= 1)
    number = torch.full((len(solver.sets),), -1)
    in_order = _in_order(solver, roles, chosen)
    number[in_order] = torch.arange(in_order.numel())
    axes = []
    for (name, dim), channels in solver.axes.items():
        groups = number[channels]
        if bool((groups >= 0).any()):
            role = roles.of(name, dim)
            depthwise = role == "out" and (name, dim) not in roles.produced
            axes.append(Axis(name, dim, role, groups, depthwise))
    families = _families(axes, in_order.numel())
    return ChannelGroups(model, scope, axes, families, analysis.unknown, _why_pinned(solver, roles))


class _Roles:
    """What the dimensions of tensors are for."""

    def __init__(self, analysis: Analysis) -> None:
        made = torch.zeros(len(analysis.sets), dtype=torch.bool)
        for read in analysis.reads:
            made[read.outputs] = True
        self.scales = _norm_scales(analysis.graph)
        self.out_axes = analysis.out_axes
        self.produced = [
            (name, dim)
            for name, dims in analysis.labels.items()
            for dim, labels in enumerate(dims)
            if labels is not None and len(dims) > 1 and bool(made[labels].any())
        ]

    def of(self, name: str, dim: int) -> str:
        if name in self.scales:
            return "scale"
        if (name, dim) in self.produced or self.out_axes.get(name) == dim:
            return "out"
        return "in" if name in self.out_axes else "other"


def _norm_scales(graph: TracedGraph) -> set[str]:
    found = set()
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) not in _NORMS:
            continue
        names = [a.name for a in _torch.schema(node.target).arguments]
        scale = dict(zip(names, node.args, strict=False), **node.kwargs).get("weight")
        if scale in graph.tensor_names:
            found.add(graph.tensor_names[scale])
    return found


def _in_order(solver: Solver, roles: _Roles, chosen: Tensor) -> Tensor:
    """The chosen channels in the order in which the filters that make them lie in the model."""
    made = [solver.axes[axis] for axis in solver.axes if axis in set(roles.produced)]
    listed = torch.cat(made) if made else torch.zeros(0, dtype=torch.int64)
    listed = listed[chosen[listed]]
    position = torch.full((len(chosen),), listed.numel())
    position.scatter_reduce_(0, listed, torch.arange(listed.numel()), "amin")
    channels = listed.unique()
    return channels[position[channels].argsort()]


def _families(axes: list[Axis], count: int) -> Tensor:
    """Groups that share the filters of some weight, directly or through others, numbered from 0 in their order."""
    family = torch.arange(count)
    made = [a.groups[a.groups >= 0] for a in axes if a.makes_channels]
    while True:
        before = family.clone()
        for groups in made:
            family[groups] = family[groups].min()
        family = family[family]
        if torch.equal(before, family):
            return family.unique(return_inverse=True)[1]


def _why_pinned(solver: Solver, roles: _Roles) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for axis in roles.produced:
        for channel in solver.axes[axis].unique().tolist():
            if bool(solver.sets.pinned[channel]):
                reason = solver.sets.pin_reason(channel)
                reasons[reason] = reasons.get(reason, 0) + 1
    return reasons
