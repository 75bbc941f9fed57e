"""Carrying a plan out: every tensor of a model, its gradient and its optimizer state, cut along the plan in
two launches.

Nothing of the model is touched before all new tensors exist, so that an error leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import optimizer as optimizer_state
from .branches import replacement
from .gather import compact_filters
from .tracing import all_tensors, canonical_names

if TYPE_CHECKING:
    from .plan import CompactionPlan


class CutError(ValueError):
    """The plan does not fit what it is applied to."""


@dataclass(frozen=True)
class Cut:
    """The kept indices of one dimension. For the input dimension of a grouped convolution one list per kept
    group: each group keeps its own inputs."""

    dim: int
    keep: Sequence[int] | None = None
    groups: Sequence[Sequence[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        if self.groups is not None:
            return {"dim": self.dim, "groups": [list(g) for g in self.groups]}
        return {"dim": self.dim, "keep": list(self.keep or [])}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cut:
        if "groups" in data:
            return cls(int(data["dim"]), groups=[[int(i) for i in g] for g in data["groups"]])
        return cls(int(data["dim"]), keep=[int(i) for i in data["keep"]])

    def size(self) -> int:
        return len(self.groups[0]) if self.groups is not None else len(self.keep or [])


def cut_shape(shape: Sequence[int], cuts: Sequence[Cut]) -> tuple[int, ...]:
    result = list(shape)
    for cut in cuts:
        result[cut.dim] = cut.size()
    return tuple(result)


def cut_tensors(tensors: Sequence[Tensor], cuts: Sequence[Sequence[Cut]]) -> list[Tensor]:
    """Each tensor with its cuts made: one gather for the first dimensions of all, one for their second
    ones."""
    results = list(tensors)
    indices: dict[
        tuple[int, ...], Tensor
    ] = {}  # equal lists of kept indices share one tensor, checked and moved once
    rounds = max((len([c for c in per if c.keep is not None]) for per in cuts), default=0)
    for number in range(rounds):
        members, keep, dims = [], [], []
        for i, per in enumerate(cuts):
            plain = [c for c in per if c.keep is not None]
            if number < len(plain):
                key = tuple(plain[number].keep or ())
                members.append(i)
                keep.append(indices.setdefault(key, torch.tensor(key, dtype=torch.int64)))
                dims.append(plain[number].dim)
        for i, result in zip(
            members, compact_filters([results[i] for i in members], keep, dims), strict=True
        ):
            results[i] = result
    for i, per in enumerate(cuts):
        for cut in per:
            if cut.groups is not None:
                results[i] = _cut_groups(results[i], cut)
    return results


def _cut_groups(weight: Tensor, cut: Cut) -> Tensor:
    assert cut.groups is not None
    slabs = list(weight.detach().chunk(len(cut.groups), 0))
    keep = [torch.tensor(list(g), dtype=torch.int64) for g in cut.groups]
    return torch.cat(compact_filters(slabs, keep, cut.dim), 0)


def apply_cuts(model: nn.Module, plan: CompactionPlan, optimizer: torch.optim.Optimizer | None) -> None:
    """Cut `model` in place. CutError, and nothing changed, where the plan does not fit."""
    names = canonical_names(model)
    tensors = {n: t for n, t in all_tensors(model) if names[n] == n}
    gone = {n for n in tensors if any(n.startswith(f"{path}.") for path in plan.replaced)}
    _check_paths(model, plan)
    moved = {n for n in plan.cuts if n not in gone}

    jobs: list[tuple[Tensor, Sequence[Cut]]] = []
    for name in moved:
        _check_cuts(name, tuple(tensors[name].shape), plan.cuts[name])
    order = [n for n in tensors if n in moved]
    jobs += [(tensors[n], plan.cuts[n]) for n in order]
    graded = [n for n in order if tensors[n].grad is not None]
    jobs += [(g, plan.cuts[n]) for n in graded if (g := tensors[n].grad) is not None]
    carried = optimizer_state.Carried(optimizer, tensors, {n: plan.cuts[n] for n in order}, gone)
    jobs += carried.jobs()
    results = cut_tensors([t for t, _ in jobs], [c for _, c in jobs])

    new: dict[str, Tensor] = {}
    for name, result in zip(order, results, strict=False):
        new[name] = _like(tensors[name], result)
    for name, result in zip(graded, results[len(order) :], strict=False):
        new[name].grad = result
    carried.take(results[len(order) + len(graded) :])
    added = _biases(model, plan, tensors, new)

    # From here on nothing can fail.
    for path, kind in plan.replaced.items():
        _set_module(model, path, kind)
    for alias, name in names.items():
        if name in new and name not in gone:
            _set_tensor(model, alias, new[name])
    for name, parameter in added.items():
        _set_tensor(model, name, parameter)
    for path, values in plan.attributes.items():
        module = model.get_submodule(path)
        for attribute, value in values.items():
            setattr(module, attribute, tuple(value) if isinstance(value, list) else value)
    carried.commit(new, {n: (p, tensors[names[weight_of(n)]]) for n, p in added.items()})


def weight_of(bias: str) -> str:
    """The name of the weight of the layer that a bias belongs to."""
    prefix, dot, _ = bias.rpartition(".")
    return f"{prefix}{dot}weight"


def _check_paths(model: nn.Module, plan: CompactionPlan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for path in [*plan.replaced, *plan.attributes]:
        if path not in modules:
            raise CutError(f"this plan is for another model: it has no module {path!r}")
    for path, values in plan.attributes.items():
        if any(path == p or path.startswith(f"{p}.") for p in plan.replaced):
            raise CutError(f"damaged compaction plan: {path!r} is replaced and has attributes")
        for attribute in values:
            if not hasattr(modules[path], attribute):
                raise CutError(f"this plan is for another model: {path!r} has no attribute {attribute!r}")
    for name, entry in plan.biases.items():
        owner = modules.get(name.rpartition(".")[0])
        if owner is None or (entry["create"] and getattr(owner, "bias", True) is not None):
            raise CutError(f"this plan is for another model: {name} cannot be added")


def _check_cuts(name: str, shape: tuple[int, ...], cuts: Sequence[Cut]) -> None:
    for cut in cuts:
        if not 0 <= cut.dim < len(shape):
            raise CutError(f"damaged compaction plan: {name} of shape {shape} has no dimension {cut.dim}")
        for keep in cut.groups if cut.groups is not None else [cut.keep or []]:
            if not keep or len(set(keep)) != len(keep) or min(keep) < 0 or max(keep) >= shape[cut.dim]:
                raise CutError(
                    f"damaged compaction plan: the kept indices of {name}, dimension {cut.dim}, are not "
                    "unique indices "
                    f"in [0, {shape[cut.dim]})"
                )
        if cut.groups is not None and len({len(g) for g in cut.groups}) != 1:
            raise CutError(f"damaged compaction plan: the groups of {name} keep different numbers of inputs")


def _biases(
    model: nn.Module, plan: CompactionPlan, tensors: dict[str, Tensor], new: dict[str, Tensor]
) -> dict[str, nn.Parameter]:
    """Add the absorbed constants to the new biases in `new`; return the biases that have to be made."""
    added: dict[str, nn.Parameter] = {}
    for name, entry in plan.biases.items():
        amount = torch.tensor(entry["add"], dtype=torch.float64)
        if entry["create"]:
            prefix = name.rpartition(".")[0]
            owner = model.get_submodule(prefix)
            weight: Any = owner.weight
            added[name] = nn.Parameter(
                amount.to(device=weight.device, dtype=weight.dtype), requires_grad=weight.requires_grad
            )
            continue
        old = tensors.get(name)
        bias = new.get(name)
        if old is None:
            raise CutError(f"this plan is for another model: {name} is missing")
        if bias is None:
            bias = new[name] = _like(old, old.detach().clone())
            bias.grad = old.grad
        if bias.shape != amount.shape:
            raise CutError(
                f"damaged compaction plan: {name} keeps {tuple(bias.shape)}, adds {tuple(amount.shape)}"
            )
        with torch.no_grad():
            bias.copy_((bias.double() + amount.to(bias.device)).to(bias.dtype))
    return added


def _like(old: Tensor, data: Tensor) -> Tensor:
    return nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data


def _set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    prefix, _, leaf = name.rpartition(".")
    owner = model.get_submodule(prefix)
    if isinstance(tensor, nn.Parameter):
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def _set_module(model: nn.Module, path: str, kind: str) -> None:
    prefix, _, leaf = path.rpartition(".")
    old = model.get_submodule(path)
    new = replacement(kind)
    new.training = old.training
    model.get_submodule(prefix)._modules[leaf] = new
