"""The optimizer goes on training what is left: parameters and their state are exchanged in place, group by
group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...models import all_tensors, canonical_names
from .cuts import Changes, Cut, cut_tensors, weight_of
from .merges import Merge, merged

# Averages of the parameter itself, which are merged as it is. All other states are statistics of its gradient: that of
# a merged weight is its own as before, because W' = W_j + sum_i (v_i / v_j) W_i has the gradient of W_j.
_AVERAGES = {"ax"}  # of ASGD


class OptimizerError(ValueError):
    """The optimizer's state cannot follow its parameters."""


def check_optimizer(optimizer: Any) -> None:
    """TypeError unless it is an optimizer, or None."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        what = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(f"optimizer: expected the torch.optim.Optimizer that trains the model, got {what}")


class Carried:
    """The state of an optimizer on its way from old parameters to new ones.

    `jobs` lists the state tensors to cut, `take` gets them back cut, `commit` writes all into the optimizer.
    The constructor raises, before anything is changed, for a state that cannot be cut: one that is neither a
    scalar nor of its parameter's shape (factored second moments, histories).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | None,
        tensors: Mapping[str, Tensor],
        cuts: Mapping[str, Sequence[Cut]],
        gone: set[str],
        merges: Mapping[str, Sequence[Merge]],
    ) -> None:
        self._optimizer = optimizer
        self._names = {id(t): n for n, t in tensors.items() if isinstance(t, nn.Parameter)}
        self._gone = gone
        self._slots: list[tuple[str, str]] = []
        self._jobs: list[tuple[Tensor, Sequence[Cut]]] = []
        self._states: dict[str, dict[str, Any]] = {}
        if optimizer is None:
            return
        seen: set[int] = set()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = self._names.get(id(parameter))
                if name is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                state = dict(optimizer.state.get(parameter, {}))
                self._states[name] = state
                if name not in cuts:
                    continue
                for key, value in state.items():
                    if not isinstance(value, Tensor):
                        if isinstance(value, list | tuple | dict) and value:
                            raise OptimizerError(_refusal(optimizer, key, name, f"a {type(value).__name__}"))
                        continue
                    if value.shape == parameter.shape and value.dim() > 0:
                        self._slots.append((name, key))
                        made = merged(value, merges.get(name, ())) if key in _AVERAGES else value
                        self._jobs.append((made, cuts[name]))
                    elif value.numel() != 1:
                        raise OptimizerError(
                            _refusal(optimizer, key, name, f"a tensor of shape {tuple(value.shape)}")
                        )
        if not seen:
            raise OptimizerError(
                "optimizer: none of the model's parameters is in it; pass the optimizer that trains this "
                "model"
            )
        if cuts or gone:
            self._check_no_flat_state(optimizer)

    def _check_no_flat_state(self, optimizer: torch.optim.Optimizer) -> None:
        """LBFGS keeps one history of all parameters, as the state of the first one, which need not be cut itself."""
        every = [p for group in optimizer.param_groups for p in group["params"]]
        elements = sum(p.numel() for p in every)
        for name, state in self._states.items():
            for key, value in state.items():
                if len(every) > 1 and isinstance(value, Tensor) and value.shape == (elements,):
                    raise OptimizerError(_refusal(optimizer, key, name, "a vector of all parameters"))

    def jobs(self) -> list[tuple[Tensor, Sequence[Cut]]]:
        return self._jobs

    def take(self, results: Sequence[Tensor]) -> None:
        for (name, key), result in zip(self._slots, results, strict=True):
            self._states[name][key] = result

    def commit(
        self, new: Mapping[str, Tensor], added: Mapping[str, tuple[nn.Parameter, Tensor | None]]
    ) -> None:
        """Exchange the parameters. `added`: a bias that did not exist -> it, and the old weight of its layer,
        whose group it joins."""
        optimizer = self._optimizer
        if optimizer is None:
            return
        for group in optimizer.param_groups:
            parameters: list[Tensor] = []
            kept_names: list[str] = []  # where the optimizer was given named parameters
            given_names = group.get("param_names") or [""] * len(group["params"])
            for parameter, given in zip(group["params"], given_names, strict=True):
                name = self._names.get(id(parameter))
                if name in self._gone:
                    optimizer.state.pop(parameter, None)
                    continue
                replaced = new.get(name) if name is not None else None
                if name is not None and replaced is not None:
                    optimizer.state.pop(parameter, None)
                    if self._states[name]:
                        optimizer.state[replaced] = self._states[name]
                    parameters.append(replaced)
                else:
                    parameters.append(parameter)
                kept_names.append(given)
                for bias_name, (bias, weight) in added.items():
                    if weight is parameter and bias.requires_grad:
                        parameters.append(bias)
                        kept_names.append(_sibling(given, bias_name))
            group["params"][:] = parameters  # the list itself: LBFGS has a reference to it
            if "param_names" in group:
                group["param_names"][:] = kept_names


def _sibling(given: str, name: str) -> str:
    """What the optimizer calls the bias `name`, by what it calls the weight of the same layer."""
    prefix, dot, _ = given.rpartition(".")
    return f"{prefix}{dot}{name.rpartition('.')[2]}"


def _refusal(optimizer: torch.optim.Optimizer, key: str, name: str, what: str) -> str:
    return (
        f"optimizer: the state {key!r} of {type(optimizer).__name__} for {name} is {what}, neither a "
        "scalar nor of its "
        "parameter's shape, so it cannot be cut; compact without optimizer= and make a new optimizer for "
        "the result"
    )


def carry_over(optimizer: torch.optim.Optimizer, source: nn.Module, result: nn.Module, plan: Changes) -> None:
    """Let an optimizer that trains `source` train `result`, the copy of `source` that `plan` has cut."""
    names = canonical_names(source)
    old = {n: t for n, t in all_tensors(source) if names[n] == n}
    new = dict(all_tensors(result))
    gone = {n for n in old if any(n.startswith(f"{path}.") for path in plan.replaced)}
    cuts = {n: c for n, c in plan.cuts.items() if n not in gone}
    carried = Carried(optimizer, old, cuts, gone, plan.merges)
    jobs = carried.jobs()
    carried.take(cut_tensors([t for t, _ in jobs], [c for _, c in jobs]))
    added: dict[str, tuple[nn.Parameter, Tensor | None]] = {}
    for name, entry in plan.biases.items():
        bias = new[name]
        if entry["create"] and isinstance(bias, nn.Parameter):
            added[name] = (bias, old[names[weight_of(name)]])
    carried.commit({n: new[n] for n in old if n not in gone}, added)
