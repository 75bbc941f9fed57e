"""Carrying a plan out: every tensor of a model, its gradient and its optimizer state, cut along the plan in
two launches.

Nothing of the model is touched before all new tensors exist, so that an error leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models import all_tensors, canonical_names
from ..graph.branches import replacement
from ..graph.states import on_cpu
from . import optimizer as optimizer_state
from .cuts import Changes, Cut, CutError, cut_tensors, weight_of
from .merges import check_merges, merged


def apply_cuts(model: nn.Module, plan: Changes, optimizer: torch.optim.Optimizer | None) -> None:
    """Cut `model` in place. CutError, and nothing changed, where the plan does not fit."""
    names = canonical_names(model)
    tensors = {n: t for n, t in all_tensors(model) if names[n] == n}
    gone = {n for n in tensors if any(n.startswith(f"{path}.") for path in plan.replaced)}
    _check_paths(model, plan)
    moved = {n for n in plan.cuts if n not in gone}

    jobs: list[tuple[Tensor, Sequence[Cut]]] = []
    for name in moved:
        _check_cuts(name, tuple(tensors[name].shape), plan.cuts[name])
    for name in set(plan.merges) - gone:
        if name not in moved:
            raise CutError(f"damaged compaction plan: channels of {name} are merged, but none is cut")
        check_merges(name, tensors[name].shape, plan.merges[name])
    order = [n for n in tensors if n in moved]
    jobs += [(merged(tensors[n], plan.merges.get(n, ())), plan.cuts[n]) for n in order]
    graded = [n for n in order if tensors[n].grad is not None]
    jobs += [(g, plan.cuts[n]) for n in graded if (g := tensors[n].grad) is not None]
    carried = optimizer_state.Carried(optimizer, tensors, {n: plan.cuts[n] for n in order}, gone, plan.merges)
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
            if isinstance(value, list):
                value = list(value) if isinstance(getattr(module, attribute), list) else tuple(value)
            setattr(module, attribute, value)
    carried.commit(new, {n: (p, tensors[names[weight_of(n)]]) for n, p in added.items()})


def _check_paths(model: nn.Module, plan: Changes) -> None:
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


@on_cpu
def _biases(
    model: nn.Module, plan: Changes, tensors: dict[str, Tensor], new: dict[str, Tensor]
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
    setattr(model.get_submodule(prefix), leaf, tensor)


def _set_module(model: nn.Module, path: str, kind: str) -> None:
    old = model.get_submodule(path)
    new = replacement(kind)
    new.training = old.training
    model.set_submodule(path, new)
