"""Sizes that modules keep as attributes, and what they are after a cut.

Those of torch's own modules (`out_channels`, ...) follow from the shapes of their weights. Those of the user's modules
(`num_heads`, `num_features`, the sizes of a split) follow where they are the size of something that is cut, and nothing
else inside the module is of that size and stays so; the others are stale.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..filters import CONVOLUTIONS, TRANSPOSED, BatchNorm
from ..graph.solver import Solver
from .cuts import Cut, cut_shape

Attributes = dict[str, dict[str, Any]]

# Numbers that are no counts of channels, even where they are equal to one.
_OTHER = re.compile(
    "kernel|stride|padd|dilat|patch|image|img|resol|depth|layers|blocks|class|label|vocab|length|window|level|epoch|"
    "seed|version|scale|max_|min_|_id$"
)


class Sizes:
    """What the attributes of all modules are once the channels of `removed` have left."""

    def __init__(
        self,
        solver: Solver,
        removed: Tensor,
        cuts: Mapping[str, list[Cut]],
        source: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.solver, self.removed, self.cuts, self.source = solver, removed, cuts, source
        self.graph = solver.analysis.graph
        self.known: Attributes = {}
        self._told: set[tuple[str, str]] = (
            set()
        )  # (path, attribute) that the shape of a weight tells, changed or not
        self._evidence: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
        self._look_at_known_modules()
        self._look_at_tensors()

    def attributes(self, alone: Container[str] = ()) -> Attributes:
        """Path of a module -> the attributes that change, and their new values. Of the user's modules those that are
        not left `alone`."""
        result = {path: dict(values) for path, values in self.known.items()}
        for path, values in self.followed().items():
            if path not in alone:
                result.setdefault(path, {}).update(values)
        return result

    def followed(self) -> Attributes:
        """Those of the user's own modules."""
        result: Attributes = {}
        for path, attribute, value in self._own():
            new = self._new(path, attribute, value)
            if new is not None and new != value:
                result.setdefault(path, {})[attribute] = new
        return result

    def stale(self, alone: Container[str] = ()) -> list[str]:
        """Attributes of the user's own modules that were a size of what is cut, and may be wrong now."""
        followed = self.followed()
        found = []
        for path, attribute, value in self._own():
            if path not in alone and attribute in followed.get(path, {}):
                continue
            if isinstance(value, int) and self._after(path, value) - {value}:
                found.append(f"{path}.{attribute}={value}" if path else f"{attribute}={value}")
        return found

    # ---------------------------------------------------------------------------------------------------
    # Evidence: sizes before, and what became of them
    # ---------------------------------------------------------------------------------------------------

    def _look_at_known_modules(self) -> None:
        groups = self._groups()
        for path, module in self.graph.modules.items():
            values = _sizes(module, self._weight_shape(path), groups.get(path))
            for attribute, new in values.items():
                old = getattr(module, attribute)
                self._told.add((path, attribute))
                self._evidence[path][old].add(new)
                if old != new:
                    self.known.setdefault(path, {})[attribute] = new
        for path, module in self.graph.modules.items():
            if isinstance(module, nn.MultiheadAttention) and module.k_proj_weight is not None:
                for attribute, name in (("kdim", "k_proj_weight"), ("vdim", "v_proj_weight")):
                    size = self._shape(f"{path}.{name}" if path else name)[1]
                    if getattr(module, attribute) != size:
                        self.known.setdefault(path, {})[attribute] = size
        for path, attribute, labels in self.solver.analysis.sized:
            owner = self.graph.modules.get(path)
            self._told.add((path, attribute))
            size = self._left(labels)
            if owner is not None and getattr(owner, attribute, size) != size:
                self.known.setdefault(path, {})[attribute] = size

    def _look_at_tensors(self) -> None:
        for (name, dim), channels in self.solver.axes.items():
            if (
                not bool(self.solver.sets.pinned[channels].all())
                or self.solver.analysis.out_axes.get(name) == dim
            ):
                owner = name.rpartition(".")[0]
                self._evidence[owner][channels.numel()].add(
                    channels.numel() - int(self.removed[channels].sum())
                )

    def _groups(self) -> dict[str, int]:
        groups: dict[str, int] = {}
        for constraint, parts, inputs in self.solver.parts:
            if constraint.module is not None:
                together = (
                    [torch.cat([p, i]) for p, i in zip(parts, inputs, strict=True)] if inputs else parts
                )
                groups[constraint.module] = sum(not bool(self.removed[c].all()) for c in together)
        return groups

    def _weight_shape(self, path: str) -> tuple[int, ...] | None:
        name = self.graph.name_of.get(f"{path}.weight" if path else "weight")
        return None if name is None else self._shape(name)

    def _shape(self, name: str) -> tuple[int, ...]:
        name = self.graph.name_of[name]
        return cut_shape(self.source[name], self.cuts.get(name, []))

    def _left(self, labels: Tensor) -> int:
        return int((~self.removed[self.solver.sets.channel_of[labels]]).sum())

    # ---------------------------------------------------------------------------------------------------
    # The user's own modules
    # ---------------------------------------------------------------------------------------------------

    def _own(self) -> list[tuple[str, str, Any]]:
        """(path, attribute, value) of whole numbers and lists of them that modules keep."""
        found: list[tuple[str, str, Any]] = []
        seen: set[int] = set()
        for path, module in self.graph.modules.items():
            if id(module) in seen or type(module).__module__.startswith("torch."):
                continue
            seen.add(id(module))
            for attribute, value in vars(module).items():
                if (path, attribute) in self._told:
                    continue
                if type(value) is int and value > 1 and not _OTHER.search(attribute):
                    found.append((path, attribute, value))
                elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
                    found.append((path, attribute, list(value)))
        return found

    def _new(self, path: str, attribute: str, value: Any) -> Any:
        """The value after the cut, None where it cannot be told."""
        analysis = self.solver.analysis
        if isinstance(value, list):
            lists = {
                tuple(self._left(p) for p in parts)
                for owner, parts in analysis.divided
                if owner == path and [p.numel() for p in parts] == value
            }
            return list(lists.pop()) if len(lists) == 1 else None
        counts = {
            self._left(part)
            for owner, parts in analysis.divided
            if owner == path
            for part in parts
            if part.numel() == value
        }
        heads = {
            self._left(p[0])
            for owner, p in analysis.divided
            if owner == path and len(p) == 1 and p[0].numel() == value
        }
        if "dim" in attribute and heads:
            counts -= heads  # heads are counted, and how wide they are is another number
        after = counts or self._after(path, value)
        return next(iter(after)) if len(after) == 1 else None

    def _after(self, path: str, value: int) -> set[int]:
        """What has become of the sizes `value` inside a module."""
        prefix = f"{path}." if path else ""
        found: set[int] = set()
        for owner, sizes in self._evidence.items():
            if owner == path or owner.startswith(prefix):
                found |= sizes.get(value, set())
        return found


def _sizes(module: nn.Module, weight: tuple[int, ...] | None, groups: int | None) -> dict[str, Any]:
    """The sizes that a module keeps as attributes, from the new shape of its weight."""
    if weight is None:
        return {}
    if isinstance(module, TRANSPOSED):
        depthwise = module.groups == module.in_channels and module.groups > 1
        new_groups = weight[0] if depthwise else module.groups
        return {"in_channels": weight[0], "out_channels": weight[1] * new_groups, "groups": new_groups}
    if isinstance(module, CONVOLUTIONS):
        if groups is not None:
            new_groups = groups
        elif module.groups == module.in_channels and module.groups > 1:
            new_groups = weight[0] // (module.out_channels // module.in_channels)
        else:
            new_groups = module.groups
        return {"out_channels": weight[0], "in_channels": weight[1] * new_groups, "groups": new_groups}
    if isinstance(module, nn.Linear):
        return {"out_features": weight[0], "in_features": weight[1]}
    if isinstance(module, nn.GroupNorm):
        return {"num_channels": weight[0], **({} if groups is None else {"num_groups": groups})}
    if isinstance(module, (*BatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)):
        return {"num_features": weight[0]}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight[0]}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' linear layer of GPT-2
        return {"nf": weight[1], **({"nx": weight[0]} if hasattr(module, "nx") else {})}
    return {}
