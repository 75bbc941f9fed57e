"""Groups of slices of a model's tensors: sums over each group, and vectors over groups laid out along the tensors.

`channel_groups` finds such groups in the graph; a penalty may also make its own (the filters of each layer).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..states import on_cpu
from .shards import Local, local_parts, sum_over_ranks


@dataclass(frozen=True)
class Axis:
    """One dimension of one tensor.

    Attributes:
        role: ``"out"`` (the filters of a weight), ``"in"`` (the channels that it reads), ``"scale"`` (of a norm) or
            ``"other"`` (biases, statistics, ...).
        groups: For every index the number of its group, -1 where it is in none.
        depthwise: The filters belong to the channels that they read: they pass a channel on and make none.
    """

    name: str
    dim: int
    role: str
    groups: Tensor
    depthwise: bool = False

    @property
    def makes_channels(self) -> bool:
        return self.role == "out" and not self.depthwise


class Slices:
    """``count`` groups of slices, given by the axes that they lie on. Tensors are looked up by name at every call."""

    def __init__(self, model: nn.Module, axes: Iterable[Axis], count: int) -> None:
        self.model = model
        self.axes = tuple(axes)
        self._count = count
        self._owners = {a.name: _owner(model, a.name) for a in self.axes}
        self._shapes = {name: tuple(t.shape) for name, t in self._look_up(self._owners).items()}
        self._sums: dict[tuple[object, ...], GroupSums] = {}
        self._indices: dict[tuple[object, ...], Tensor] = {}

    def __len__(self) -> int:
        return self._count

    def _look_up(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: getattr(*self._owners[name]) for name in names}

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors that the model has now, by name: those with a slice in some group. ValueError where a shape has
        changed since (the model was cut): make the groups again."""
        found = self._look_up(self._owners if names is None else names)
        for name, tensor in found.items():
            if tuple(tensor.shape) != self._shapes[name]:
                raise ValueError(
                    f"model: {name} has shape {tuple(tensor.shape)}, and had {self._shapes[name]} when its groups were "
                    "made; make them again for the model as it is now"
                )
        return found

    def owner(self, name: str) -> nn.Module:
        """The module that has the tensor."""
        return self._owners[name][0]

    def local(self, names: Sequence[str]) -> list[Local]:
        """The parts of tensors on this rank."""
        tensors = self.tensors(dict.fromkeys(names))
        return local_parts(tensors[name] for name in names)

    def sums_of_squares(
        self, axes: Sequence[Axis], parts: Sequence[Local], values: Sequence[Tensor]
    ) -> Tensor:
        """(groups,) in float64: the squares of one value for each slice of each axis (its norm), added up for each
        group and, where a tensor is sharded, over all ranks."""
        if not parts:
            return torch.zeros(len(self), dtype=torch.float64, device="cpu")
        device = parts[0].tensor.device
        whole = [_whole(v, axis, part).to(device) for v, axis, part in zip(values, axes, parts, strict=True)]
        key = (device, *_keys(axes))
        if key not in self._sums:
            self._sums[key] = GroupSums([axis.groups for axis in axes], len(self), device)
        return sum_over_ranks(self._sums[key](torch.cat(whole).double().square()), parts)

    def spread(
        self, axes: Sequence[Axis], parts: Sequence[Local], vector: Tensor, outside: float
    ) -> list[Tensor]:
        """For each axis a vector with, for each slice in this rank's part, the entry of its group; `outside` for slices
        in none. One gather for the axes of a device."""
        results: list[Tensor | None] = [None] * len(axes)
        for device in dict.fromkeys(part.tensor.device for part in parts):
            here = [i for i, part in enumerate(parts) if part.tensor.device == device]
            key = (device, *_keys([axes[i] for i in here]))
            if key not in self._indices:
                self._indices[key] = torch.cat([axes[i].groups for i in here]).to(device)
            padded = torch.cat(
                [vector.to(device), vector.new_full((1,), outside, device=device)]
            )  # -1: the last
            for i, entries in zip(
                here, padded[self._indices[key]].split([axes[i].groups.numel() for i in here]), strict=True
            ):
                rows = parts[i].first_row, parts[i].tensor.shape[0]
                results[i] = entries.narrow(0, *rows) if axes[i].dim == 0 else entries
        return [r for r in results if r is not None]


class GroupSums:
    """Adds up the entries of each group in a fixed order, without atomics: the same bits on every run and rank."""

    @on_cpu
    def __init__(self, groups: list[Tensor], count: int, device: torch.device) -> None:
        entries = torch.cat([g.cpu() for g in groups]) if groups else torch.zeros(0, dtype=torch.int64)
        by_group = entries.argsort(stable=True)[int((entries < 0).sum()) :]
        sizes = torch.bincount(entries[by_group], minlength=count)
        starts = sizes.cumsum(0) - sizes
        self.count = count
        # Groups with as many entries as each other are one matrix to sum along: a network has few such sizes.
        self.parts = []
        for size in sizes.unique().tolist():
            members = (sizes == size).nonzero().flatten()
            where = by_group[starts[members][:, None] + torch.arange(size)]
            self.parts.append((members.to(device), where.to(device)))

    def __call__(self, flat: Tensor) -> Tensor:
        total = flat.new_zeros(self.count)
        for members, where in self.parts:
            total[members] = flat[where].sum(1)
        return total


def _keys(axes: Iterable[Axis]) -> list[tuple[str, int]]:
    return [(axis.name, axis.dim) for axis in axes]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _whole(values: Tensor, axis: Axis, part: Local) -> Tensor:
    """The values of a rank's slices at their place among all of the axis."""
    if not part.counts:
        return values.new_zeros(axis.groups.numel())
    if axis.dim != 0 or values.numel() == axis.groups.numel():
        return values
    whole = values.new_zeros(axis.groups.numel())
    whole[part.first_row : part.first_row + values.numel()] = values
    return whole
