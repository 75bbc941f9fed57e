"""`compact`: dead channels leave a model, and it computes the same function. START HERE for the pruning side.

tracing -> analysis (rules_*: what each op does to channels and constants) -> liveness (which may leave) ->
planning (the plan) -> cutting (the tensors) -> checking (against the source) -> the same again, where the cut
may have made more possible (composing) -> report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import hooks
from ..models import as_call, copy_without_hooks, deep_copy
from .graph.analysis import Analysis
from .graph.branches import dead_branches
from .graph.solver import Options, Solver
from .graph.trace import trace
from .measure import count_bytes, count_flops, count_parameters, measure_latency
from .ranks import check_same_on_all_ranks
from .report import CompactionReport, channel_sets
from .surgery import optimizer as optimizer_state
from .surgery.compose import compose, may_continue, removed_by
from .surgery.make_plan import make_plan
from .surgery.plan import CompactionPlan, check_plain_module, source_shapes
from .verify import Check, Mismatch, unreached_parameters

# Each round removes something, so they end anyway. Among 200 random graphs none needed more than two.
MAX_ROUNDS = 8


@dataclass(frozen=True)
class Compaction:
    """The result of `compact`: the smaller ``model``, the ``plan`` to make another one so, the ``report``."""

    model: nn.Module
    plan: CompactionPlan
    report: CompactionReport


def compact(
    model: nn.Module,
    example_inputs: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    round_to: int = 1,
    min_channels: int = 1,
    strict: bool = True,
    inplace: bool = False,
    measure: bool = True,
) -> Compaction:
    """Take the dead channels out of a model, exactly or not at all.

    The model is traced with ``torch.export`` in eval mode. A channel leaves if it is the constant 0, or a
    constant that all its readers absorb in their biases, or if nobody reads it, together with all channels
    coupled to it (residual additions, depthwise convolutions, groups). Everything else stays, and the report
    says why. The result is run against ``model`` before it is returned; what does not hold is not removed. Where
    eval mode leaves parameters unread (auxiliary classifiers), it also has to run in training mode.

    Args:
        model: Any module that ``torch.export`` can trace. It is not changed, unless ``inplace``.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs; their shapes are what is
        traced.
        optimizer: The optimizer that trains ``model``. Its parameters and their state (of any optimizer whose
            state has its parameter's shape: SGD, Adam, AdamW, ...) are exchanged in place: it goes on with
            the result.
        round_to: Channel counts that change become multiples of it, by keeping the strongest dead channels.
        min_channels: What a layer whose channels are all dead keeps.
        strict: False also removes a constant that its reader cannot absorb exactly (other than 0, in front of
            a zero-padded convolution). It goes into the bias at the value it has away from the border, and
            ``report.max_error`` says what that did to the outputs.
        inplace: Cut ``model`` itself. Otherwise the result is a deep copy, without the source's hooks.
        measure: Measure the latency of both models for the report.

    Returns:
        `Compaction` (model, plan, report). The model consists of the user's own modules with smaller
        parameters; devices, dtypes, memory formats, ``requires_grad``, training mode, tied parameters and
        buffers are as they were.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the model fails on the example inputs, cannot be traced, is wrapped (DDP, FSDP,
            ``torch.compile``), an argument is out of range, or the optimizer keeps a state that cannot be cut.
            Nothing is changed then.
        RuntimeError: under ``torch.distributed``, the ranks would remove different channels.
    """
    check_plain_module(model, "compact")
    for name, value in (("round_to", round_to), ("min_channels", min_channels)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    for name, flag in (("strict", strict), ("inplace", inplace), ("measure", measure)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected True or False, got {flag!r}")
    optimizer_state.check_optimizer(optimizer)
    with check_same_on_all_ranks() as agree:
        args, kwargs = as_call(example_inputs)
        check = Check(model, args, kwargs)
        found = _Search(model, args, kwargs, check, Options(int(round_to), int(min_channels))).run(strict)
        agree(found.plan.digest())

    before = (count_parameters(model), count_flops(model, args, kwargs), count_bytes(model))
    source = model
    result = found.candidate
    if inplace:
        source = deep_copy(model) if measure else model
        found.plan.apply(model, optimizer)
        result = model
    elif optimizer is not None:
        try:
            optimizer_state.carry_over(optimizer, model, result, found.plan)
        except optimizer_state.OptimizerError as error:
            raise ValueError(str(error)) from error
    after = (count_parameters(result), count_flops(result, args, kwargs), count_bytes(result))
    report = CompactionReport(
        parameters=(before[0], after[0]),
        flops=(before[1], after[1]),
        bytes=(before[2], after[2]),
        latency=measure_latency((source, result), args, kwargs) if measure else None,
        max_error=found.error,
        max_output=check.max_output,
        sets=channel_sets(found.solver, found.removed),
        replaced=dict(found.plan.replaced),
        unknown_ops=dict(found.solver.analysis.unknown),
        notes=found.notes,
    )
    return Compaction(result, found.plan, report)


@dataclass
class _Found:
    candidate: nn.Module
    plan: CompactionPlan
    error: float
    solver: Solver
    removed: Tensor
    notes: list[str]


class _Search:
    """Looks for the largest plan that the check confirms."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], check: Check, options: Options
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.check, self.options = check, options
        self.source = source_shapes(model)
        self.notes: list[str] = []

    def run(self, strict: bool) -> _Found:
        """Rounds until one finds nothing more, as one plan: the result is as small as it gets."""
        found = self._round(strict)
        last = found
        for _ in range(MAX_ROUNDS - 1):
            if not may_continue(last.solver, last.removed):
                break
            try:
                check = Check(found.candidate, self.args, self.kwargs)
                last = _Search(found.candidate, self.args, self.kwargs, check, self.options)._round(strict)
                if last.plan.is_empty:
                    break
                plan = compose(found.plan, last.plan)
                candidate = self._cut(plan)
                error = self.check.require_equal(candidate) if strict else self.check.error(candidate)
            except (Mismatch, ValueError):
                break  # no trace of the smaller model, or no single plan: what is found so far holds
            removed = removed_by(found.solver, plan)
            found = replace(found, candidate=candidate, plan=plan, error=error, removed=removed)
        return found

    def _round(self, strict: bool) -> _Found:
        replaced, analysis = self._replace_branches()
        solver = Solver(analysis, self.options)
        forbidden = torch.zeros(len(solver.sets), dtype=torch.bool, device="cpu")
        removed, plan, candidate, error = self._largest(solver, replaced, forbidden, self.check.require_equal)
        if not strict:
            # What the forward code forbids is found with exact removals, where a difference means a mistake; here
            # only a forward that fails does.
            exact, solver = solver, Solver(Analysis(analysis.graph, strict=False), self.options)
            forbidden = solver.translate(forbidden, exact)
            removed, plan, candidate, error = self._largest(solver, replaced, forbidden, self.check.error)
        for channel in (forbidden & ~solver.sets.pinned).nonzero().flatten().tolist():
            solver.reasons.setdefault(channel, "the forward code depends on its size")
        return _Found(candidate, plan, error, solver, removed, self.notes)

    def _cut(self, plan: CompactionPlan) -> nn.Module:
        candidate = copy_without_hooks(self.model)
        plan.apply(candidate)
        return candidate

    def _replace_branches(self) -> tuple[Mapping[str, str], Analysis]:
        """The dead branches that can be replaced, confirmed by a run, and the analysis of the model without
        them."""
        base = copy_without_hooks(self.model)
        try:
            if any(hooks(m) for m in self.model.modules()):
                self.check.require_equal(base)
        except Mismatch as error:
            raise ValueError(
                f"compact: a copy of {type(self.model).__name__} without its hooks computes something "
                f"else ({error}); "
                "remove the hooks that change values first (torch.nn.utils.prune.remove, "
                "remove_parametrizations)"
            ) from error
        graph = trace(base, self.args, self.kwargs)
        self._look_at_training_mode(unreached_parameters(graph, base))
        analysis = Analysis(graph, strict=True)
        found = dead_branches(analysis)
        holding = _confirmed(list(found), lambda known, more: self._replacement_holds(found, known, more))
        replaced = {path: found[path] for path in holding}
        if replaced:
            base = self._cut(CompactionPlan(self.source, replaced=replaced))
            analysis = Analysis(trace(base, self.args, self.kwargs), strict=True)
        return replaced, analysis

    def _look_at_training_mode(self, unreached: list[str]) -> None:
        """Parameters that eval mode does not read may belong to a part that reads features in training mode."""
        failure = self.check.require_training_mode() if unreached else None
        if failure:
            self.notes.append(
                f"{', '.join(unreached[:4])}{', ...' if len(unreached) > 4 else ''} take no part in eval mode; whether "
                "the compact model runs in training mode could not be tried, because the source does not on the "
                f"example: {failure}"
            )

    def _replacement_holds(self, found: Mapping[str, str], known: list[str], more: list[str]) -> bool:
        try:
            plan = CompactionPlan(self.source, replaced={path: found[path] for path in [*known, *more]})
            self.check.require_equal(self._cut(plan))
        except Mismatch as error:
            if len(more) == 1:
                self.notes.append(f"{more[0]} is dead as a whole, but cannot be replaced: {error}")
            return False
        return True

    def _largest(
        self,
        solver: Solver,
        replaced: Mapping[str, str],
        forbidden: Tensor,
        confirm: Callable[[nn.Module], float],
    ) -> tuple[Tensor, CompactionPlan, nn.Module, float]:
        """The removal of as many families of channels, none of them `forbidden`, as `confirm` gives an error for
        instead of Mismatch; the others go into `forbidden`."""
        families = solver.family[solver.solve(forbidden)].unique().tolist()
        confirmed: list[tuple[Tensor, CompactionPlan, nn.Module, float]] = []

        def holds(known: list[int], more: list[int]) -> bool:
            chosen = {*known, *more}
            others = torch.tensor([f for f in families if f not in chosen], dtype=torch.int64, device="cpu")
            removed = solver.solve(forbidden | torch.isin(solver.family, others))
            plan = make_plan(solver, removed, self.source, replaced)
            candidate = self._cut(plan)
            try:
                error = confirm(candidate)
            except Mismatch as mismatch:
                if len(more) == 1:
                    self.notes.append(_cannot_leave(solver, more[0], mismatch))
                return False
            confirmed[:] = [(removed, plan, candidate, error)]
            return True

        chosen = _confirmed(families, holds)
        if not chosen and not holds([], []):
            raise ValueError("compact: an exact copy of the model does not give its outputs a second time")
        others = torch.tensor([f for f in families if f not in set(chosen)], dtype=torch.int64, device="cpu")
        forbidden |= torch.isin(solver.family, others)
        if others.numel():
            solver.solve(forbidden)  # its reasons are those of the last call
        return confirmed[0]


def _confirmed(items: list[Any], holds: Callable[[list[Any], list[Any]], bool]) -> list[Any]:
    """The items that hold together: all at once or, where some do not, by halves."""
    accepted: list[Any] = []

    def add(some: list[Any]) -> None:
        if not some:
            return
        if holds(accepted, some):
            accepted.extend(some)
        elif len(some) > 1:
            add(some[: len(some) // 2])
            add(some[len(some) // 2 :])

    add(items)
    return accepted


def _cannot_leave(solver: Solver, family: int, mismatch: Mismatch) -> str:
    axes = [
        f"{n}[{d}]" for (n, d), channels in solver.axes.items() if int(solver.family[channels[0]]) == family
    ]
    return f"{', '.join(axes[:4])} stay: without their dead channels the forward code fails: {mismatch}"
