"""The search for the largest plan that holds: what the analysis lets leave, less what the forward code needs, in rounds
until nothing more leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..._torch import hooks
from ...models import copy_without_hooks, evaluating
from ..graph.analysis import Analysis
from ..graph.branches import dead_branches
from ..graph.experts import unrolled
from ..graph.solver import Options, Solver
from ..graph.trace import check_own_tensors, trace
from ..verify import Check, Mismatch, training, unreached_parameters
from .attributes import Sizes
from .compose import compose, may_continue, removed_by
from .make_plan import make_plan
from .other_sizes import OtherSizes
from .plan import CompactionPlan, source_shapes
from .rehearsal import Incident, Mode, Rehearsal

# The error of a candidate cut by a plan; Mismatch where it is none.
Confirm = Callable[[nn.Module, CompactionPlan], float]

# Each round removes something, so they end anyway. Among 200 random graphs none needed more than two.
MAX_ROUNDS = 8


@dataclass
class _Removal:
    """What leaves (bool per channel), the plan that says so, a model cut by it, and its confirmed error."""

    removed: Tensor
    plan: CompactionPlan
    candidate: nn.Module
    error: float


@dataclass
class Found:
    """What the search ends with."""

    candidate: nn.Module
    plan: CompactionPlan
    error: float
    solver: Solver
    removed: Tensor
    notes: list[str]


class Search:
    """Looks for the largest plan that the check confirms."""

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], check: Check, options: Options
    ) -> None:
        self.model, self.args, self.kwargs = model, args, kwargs
        self.check, self.options = check, options
        self.other_sizes = OtherSizes(model, args, kwargs)
        self.source = source_shapes(model)
        self.notes: list[str] = []
        self.replaced: Mapping[str, str] = {}  # dead branches
        self.alone: set[str] = set()  # modules of the user's whose numbers do not follow
        self.needed: set[tuple[str, int]] = (
            set()
        )  # dimensions of tensors that the forward code needs as they are

    def run(self, strict: bool) -> Found:
        """Rounds until one finds nothing more, as one plan: the result is as small as it gets."""
        found = self._round(strict)
        last = found
        for _ in range(MAX_ROUNDS - 1):
            if not may_continue(last.solver, last.removed):
                break
            try:
                check = Check(found.candidate, self.args, self.kwargs)
                search = Search(found.candidate, self.args, self.kwargs, check, self.options)
                search.needed = self.needed
                last = search._round(strict)
                if last.plan.is_empty:
                    break
                plan = compose(found.plan, last.plan)
                candidate = self._cut(plan)
                error = (self._require_equal if strict else self._error)(candidate, plan)
            except (Mismatch, ValueError):
                break  # no trace of the smaller model, or no single plan: what is found so far holds
            removed = removed_by(found.solver, plan)
            found = replace(found, candidate=candidate, plan=plan, error=error, removed=removed)
        stale = Sizes(found.solver, found.removed, found.plan.cuts, self.source).stale(self.alone)
        if stale:
            more = f" and {len(stale) - 6} more" if len(stale) > 6 else ""
            self.notes.append(
                f"{', '.join(stale[:6])}{more} may be stale: numbers that modules of the model keep, equal to a size "
                "that was cut"
            )
        return found

    def _round(self, strict: bool) -> Found:
        analysis = self._replace_branches()
        solver = Solver(analysis, self.options)
        forbidden = torch.zeros(len(solver.sets), dtype=torch.bool, device="cpu")
        for axis in self.needed & solver.axes.keys():
            forbidden[solver.axes[axis]] = True
        found = self._largest(solver, forbidden, self._require_equal)
        if not strict:
            # What the forward code forbids is found with exact removals, where a difference means a mistake; here
            # only a forward that fails does.
            exact, solver = solver, Solver(Analysis(analysis.graph, strict=False), self.options)
            forbidden = solver.translate(forbidden, exact)
            found = self._largest(solver, forbidden, self._error)
        self.needed |= {axis for axis, channels in solver.axes.items() if bool(forbidden[channels].any())}
        for channel in (forbidden & ~solver.sets.pinned).nonzero().flatten().tolist():
            solver.reasons.setdefault(channel, "the forward code depends on its size")
        return Found(found.candidate, found.plan, found.error, solver, found.removed, self.notes)

    def _require_equal(self, candidate: nn.Module, plan: CompactionPlan) -> float:
        error = self.check.require_equal(candidate)
        if plan.biases or plan.merges:  # only constants other than 0 can be those of one size
            self.other_sizes.require_equal(candidate)
        return error

    def _error(self, candidate: nn.Module, plan: CompactionPlan) -> float:
        return self.check.error(candidate)

    def _cut(self, plan: CompactionPlan) -> nn.Module:
        candidate = copy_without_hooks(self.model)
        plan.apply(candidate)
        return candidate

    def _replace_branches(self) -> Analysis:
        """The analysis of the model without the dead branches that can be replaced, as a run confirms."""
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
        check_own_tensors(graph, self.model)
        self._look_at_training_mode(unreached_parameters(graph, base))
        analysis = Analysis(unrolled(graph), strict=True)
        found = dead_branches(analysis)
        holding = _confirmed(list(found), lambda known, more: self._replacement_holds(found, known, more))
        self.replaced = {path: found[path] for path in holding}
        if self.replaced:
            base = self._cut(CompactionPlan(self.source, replaced=self.replaced))
            analysis = Analysis(unrolled(trace(base, self.args, self.kwargs)), strict=True)
        return analysis

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

    def _largest(self, solver: Solver, forbidden: Tensor, confirm: Confirm) -> _Removal:
        """The removal of as many families of channels, none of them `forbidden`, as `confirm` gives an error for
        instead of Mismatch; the others go into `forbidden`."""
        rehearsals: list[Rehearsal] = []
        while True:
            removed, plan, candidate = self._candidate(solver, forbidden)
            try:
                return _Removal(removed, plan, candidate, confirm(candidate, plan))
            except Mismatch as mismatch:
                if (unled := self._without_following(solver, removed, confirm)) is not None:
                    return unled
                if not bool(removed.any()):
                    raise ValueError(
                        f"compact: an exact copy of {type(self.model).__name__} does not give its outputs a second "
                        f"time: {mismatch}"
                    ) from mismatch
            rehearsals = rehearsals or self._rehearsals(solver)
            needed = self._needed_in(rehearsals, solver, forbidden, candidate, removed)
            if not needed:
                return self._largest_by_halves(solver, forbidden, confirm)
            for family, problem in needed.items():
                self.notes.append(_cannot_leave(solver, family, problem))
                forbidden |= solver.family == family

    def _rehearsals(self, solver: Solver) -> list[Rehearsal]:
        """In eval mode and, where the result has to run in training mode too, in that."""
        modes: list[Mode] = [evaluating, training] if self.check.in_training_too else [evaluating]
        plan = CompactionPlan(self.source, replaced=self.replaced)
        return [Rehearsal(solver, self._cut(plan), self.args, self.kwargs, mode) for mode in modes]

    def _needed_in(
        self,
        rehearsals: list[Rehearsal],
        solver: Solver,
        forbidden: Tensor,
        candidate: nn.Module,
        removed: Tensor,
    ) -> dict[int, str]:
        """Which families the forward code needs and why, in the first of the modes in which it says so."""
        for rehearsal in rehearsals:
            incidents = rehearsal.incidents(candidate, removed)
            if needed := self._needed(solver, forbidden, rehearsal, incidents):
                mode = "in training mode, " if rehearsal.mode is training else ""
                return {family: mode + problem for family, problem in needed.items()}
        return {}

    def _without_following(
        self,
        solver: Solver,
        removed: Tensor,
        confirm: Confirm,
    ) -> _Removal | None:
        """The same removal, if it holds where some numbers that modules keep stay as they are."""
        sizes = Sizes(
            solver, removed, make_plan(solver, removed, self.source, self.replaced).cuts, self.source
        )
        paths = sorted(set(sizes.followed()) - self.alone)
        confirmed: list[_Removal] = []

        def holds(known: list[str], more: list[str]) -> bool:
            alone = self.alone | (set(paths) - {*known, *more})
            plan = make_plan(solver, removed, self.source, self.replaced, alone)
            candidate = self._cut(plan)
            try:
                confirmed[:] = [_Removal(removed, plan, candidate, confirm(candidate, plan))]
            except Mismatch:
                return False
            return True

        if not paths or not holds([], []):
            return None
        self.alone |= set(paths) - set(_confirmed(paths, holds))
        return confirmed[0]

    def _needed(
        self, solver: Solver, forbidden: Tensor, rehearsal: Rehearsal, incidents: list[Incident]
    ) -> dict[int, str]:
        """Families that the forward code needs -> what it raises without them. Of an incident's suspects, the last one
        of the shortest list that has to stay for the incident to be gone; all incidents at once."""
        found = {i.suspects[0]: i.problem for i in incidents if len(i.suspects) == 1}
        bounds = {i: [0, len(i.suspects)] for i in incidents if not found.keys() & set(i.suspects)}
        for first in range(64):
            tried = {i: hi if first == 0 else (lo + hi) // 2 for i, (lo, hi) in bounds.items() if hi - lo > 1}
            if not tried:
                break
            kept = [*found, *(family for i, count in tried.items() for family in i.suspects[:count])]
            stays = forbidden | torch.isin(solver.family, torch.tensor(kept, dtype=torch.int64, device="cpu"))
            removed, _, candidate = self._candidate(solver, stays)
            places = {i.place for i in rehearsal.incidents(candidate, removed)}
            for i, count in tried.items():
                if i.place not in places:
                    bounds[i][1] = count
                elif first == 0:
                    del bounds[i]  # nothing that is suspected explains it
                else:
                    bounds[i][0] = count
        return found | {i.suspects[hi - 1]: i.problem for i, (_, hi) in bounds.items()}

    def _candidate(self, solver: Solver, stays: Tensor) -> tuple[Tensor, CompactionPlan, nn.Module]:
        removed = solver.solve(stays)
        plan = make_plan(solver, removed, self.source, self.replaced, self.alone)
        return removed, plan, self._cut(plan)

    def _largest_by_halves(self, solver: Solver, forbidden: Tensor, confirm: Confirm) -> _Removal:
        """`_largest` where the shapes do not say which channels are needed: a trial for each half of them."""
        families = solver.family[solver.solve(forbidden)].unique().tolist()
        confirmed: list[_Removal] = []

        def holds(known: list[int], more: list[int]) -> bool:
            others = [f for f in families if f not in {*known, *more}]
            stays = forbidden | torch.isin(
                solver.family, torch.tensor(others, dtype=torch.int64, device="cpu")
            )
            removed, plan, candidate = self._candidate(solver, stays)
            try:
                error = confirm(candidate, plan)
            except Mismatch as mismatch:
                if len(more) == 1:
                    self.notes.append(_cannot_leave(solver, more[0], str(mismatch)))
                return False
            confirmed[:] = [_Removal(removed, plan, candidate, error)]
            return True

        chosen = _confirmed(families, holds)
        if not chosen and not holds([], []):
            raise ValueError("compact: an exact copy of the model does not give its outputs a second time")
        others = [f for f in families if f not in set(chosen)]
        if others:
            forbidden |= torch.isin(solver.family, torch.tensor(others, dtype=torch.int64, device="cpu"))
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


def _cannot_leave(solver: Solver, family: int, problem: str) -> str:
    axes = [
        f"{n}[{d}]" for (n, d), channels in solver.axes.items() if int(solver.family[channels[0]]) == family
    ]
    return f"{', '.join(axes[:4])} stay: without their dead channels the forward code fails: {problem}"
