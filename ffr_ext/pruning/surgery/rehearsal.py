"""Which channels the forward code needs, found in one run of a candidate that fails.

The exported graph says what shape every tensor has after the cut. Where a module of the candidate is given another
one, gives another one or raises, the forward code depends on a size (a stored list of split sizes, `view(-1, 512)`).
The tensor that was expected goes on from there, so that one run finds all such places instead of the first.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from ..._torch import map_tensors, tree_leaves
from ...models import OUT_OF_MEMORY, evaluating
from ..graph.analysis import Flow
from ..graph.solver import Solver
from ..graph.trace import module_paths

Forward = Callable[..., Any]
Mode = Callable[[nn.Module], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Incident:
    """A place where the candidate goes wrong, and the families of channels that may be why."""

    place: str
    suspects: tuple[int, ...]
    problem: str


@dataclass
class _Call:
    """One call of a module in the run of the source, the calls inside it, and what of the graph belongs to it."""

    path: str
    children: list[_Call] = field(default_factory=list)
    taken: tuple[int, ...] | None = None  # shape of its only tensor among the inputs
    given: tuple[int, ...] | None = None  # shape of its result, if that is a tensor
    nodes: list[Node] = field(default_factory=list)
    sources: list[Node] = field(default_factory=list)  # what comes in
    givers: list[_Call] = field(default_factory=list)  # the calls whose results come in
    source: Node | None = None
    result: Node | None = None


class Rehearsal:
    """Runs candidates that were cut from `base`, the model that the solver's graph was traced from."""

    def __init__(
        self,
        solver: Solver,
        base: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        mode: Mode = evaluating,
    ) -> None:
        """`mode` is that of the runs. The graph is that of eval mode; of what training mode calls besides, it is known
        what comes in, where that is what another module gives."""
        self.solver = solver
        self.made = solver.analysis.made
        self.args, self.kwargs, self.mode = args, kwargs, mode
        self.calls = self._run_of_source(base)  # of the model itself: one
        self._assign_nodes(base)

    # ---------------------------------------------------------------------------------------------------
    # The source: which call is which part of the graph
    # ---------------------------------------------------------------------------------------------------

    def _run_of_source(self, base: nn.Module) -> list[_Call]:
        top = _Call("")
        stack = [top]
        givers: list[tuple[Tensor, _Call]] = []  # results, and the calls that gave them

        def call(path: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own = _Call(path)
            stack[-1].children.append(own)
            stack.append(own)
            tensors = _tensors((args, kwargs))
            own.givers = [call for tensor, call in givers for t in tensors if t is tensor]
            try:
                result = forward(*args, **kwargs)
            finally:
                stack.pop()
            if isinstance(result, Tensor):
                givers.append((result, own))
            own.taken = tuple(tensors[0].shape) if len(tensors) == 1 else None
            own.given = tuple(result.shape) if isinstance(result, Tensor) else None
            return result

        with contextlib.suppress(_Stopped):
            self._run(base, call)
        return top.children

    def _assign_nodes(self, base: nn.Module) -> None:
        """A module is called as often as it has runs of consecutive nodes, unless it was called twice in a row."""
        calls: dict[str, list[_Call]] = defaultdict(list)
        pending = list(self.calls)
        while pending:
            call = pending.pop()
            pending += reversed(call.children)
            calls[call.path].append(call)
        for path, runs in self._runs(base).items():
            if len(runs) == len(calls[path]):
                for call, nodes in zip(calls[path], runs, strict=True):
                    self._assign(call, nodes)

    def _runs(self, base: nn.Module) -> dict[str, list[list[Node]]]:
        first = {id(m): path for path, m in base.named_modules()}
        name = {path: first[id(m)] for path, m in base.named_modules(remove_duplicate=False)}
        runs: dict[str, list[list[Node]]] = defaultdict(list)
        current: dict[str, list[Node]] = {}
        for node in self.solver.analysis.graph.nodes:
            paths = [re.sub(r"@\d+", "", path) for path in module_paths(node)]
            if node.op != "call_function" or not paths:
                continue
            inside = {name[path] for path in paths if path in name}
            current = {path: nodes for path, nodes in current.items() if path in inside}
            for path in inside:
                if path not in current:
                    runs[path].append([])
                    current[path] = runs[path][-1]
                current[path].append(node)
        return runs

    def _assign(self, call: _Call, nodes: list[Node]) -> None:
        graph, members = self.solver.analysis.graph, set(nodes)
        call.nodes = nodes
        outside = [a for n in nodes for a in n.all_input_nodes if a not in members]
        sources = [a for a in outside if a not in graph.tensor_names and a not in graph.constants]
        call.sources = list(dict.fromkeys(sources))
        results = [n for n in nodes if any(user not in members for user in n.users)]
        if len(call.sources) == 1 and self._shape(call.sources[0], None) == call.taken:
            call.source = call.sources[0]
        if len(results) == 1 and self._shape(results[0], None) == call.given:
            call.result = results[0]

    # ---------------------------------------------------------------------------------------------------
    # A candidate
    # ---------------------------------------------------------------------------------------------------

    def incidents(self, candidate: nn.Module, removed: Tensor) -> list[Incident]:
        """Where a candidate without the channels of `removed` goes wrong."""
        found: list[Incident] = []
        stack: list[Iterator[_Call]] = [iter(self.calls)]

        def note(call: _Call, flows: list[tuple[Flow, list[int]]], problem: str) -> None:
            suspects = {f for flow, dims in flows for f in self._families(flow, dims, removed)}
            if suspects:
                found.append(Incident(f"{call.path}#{id(call)}", tuple(sorted(suspects)), problem))

        def mended(call: _Call, node: Node | None, tensor: Tensor, did: str) -> Tensor:
            expected = None if node is None else self._shape(node, removed)
            if node is None or expected is None or tuple(tensor.shape) == expected:
                return tensor
            flow = self.made[node]
            same_rank = tensor.dim() == len(expected)
            wrong = [d for d in range(len(expected)) if not same_rank or tensor.shape[d] != expected[d]]
            dims = [d for d in wrong if flow.labels[d] is not None] or list(range(len(expected)))
            problem = f"{call.path or 'the model'} {did} shape {tuple(tensor.shape)}, expected {expected}"
            note(call, [(flow, dims)], problem)
            return tensor.new_zeros(expected)

        def perform(path: str, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = next(stack[-1], None)
            if call is None or call.path != path:  # control flow went another way
                call = _Call(path)
            if call.source is not None and len(_tensors((args, kwargs))) == 1:
                mend = functools.partial(mended, call, call.source, did="is given")
                args, kwargs = map_tensors(mend, (args, kwargs))
            before = len(found)
            stack.append(iter(call.children))
            try:
                result = forward(*args, **kwargs)
            except OUT_OF_MEMORY:
                raise
            except Exception as error:  # the model's own code decides what a wrong size raises
                if len(found) == before:
                    note(call, self._own_flows(call), f"{type(error).__name__}: {error}")
                if call.result is None:
                    raise
                value = call.result.meta["val"]
                shape = self._shape(call.result, removed)
                return torch.zeros(shape or (), dtype=value.dtype, device=value.device)
            finally:
                stack.pop()
            return mended(call, call.result, result, "gives") if isinstance(result, Tensor) else result

        with contextlib.suppress(_Stopped):
            self._run(candidate, perform)
        return found

    def _own_flows(self, call: _Call) -> list[tuple[Flow, list[int]]]:
        """What comes in (its sizes are asked for: `x.shape`), and what the nodes of a call's own code read and make,
        those of calls inside it left out."""
        inside = {n for child in call.children for n in child.nodes}
        own = [n for n in call.nodes if n not in inside]
        entering = call.sources or [g.result for g in call.givers if g.result is not None]
        flows = [self.made.get(m) for m in entering]
        flows += [self.made.get(m) for n in own for m in [*n.all_input_nodes, n]]
        return [(f, list(range(f.rank))) for f in flows if isinstance(f, Flow)]

    def _families(self, flow: Flow, dims: list[int], removed: Tensor) -> set[int]:
        """Of the channels that have left a tensor."""
        found: set[int] = set()
        for dim in dims:
            labels = flow.labels[dim]
            if labels is not None:
                channels = self.solver.sets.channel_of[labels]
                found |= set(self.solver.family[channels[removed[channels]]].tolist())
        return found

    def _shape(self, node: Node, removed: Tensor | None) -> tuple[int, ...] | None:
        """Of a node's tensor after the cut; None where nothing is known of it."""
        flow = self.made.get(node)
        if not isinstance(flow, Flow):
            return None
        if removed is None:
            return flow.shape
        gone = [0 if v is None else int(removed[self.solver.sets.channel_of[v]].sum()) for v in flow.labels]
        return tuple(size - less for size, less in zip(flow.shape, gone, strict=True))

    def _run(self, model: nn.Module, call: Callable[..., Any]) -> None:
        args, kwargs = map_tensors(Tensor.clone, (self.args, self.kwargs))
        with self.mode(model), _intercepted(model, call):
            try:
                model(*args, **kwargs)
            except OUT_OF_MEMORY:
                raise
            except Exception as error:
                raise _Stopped from error


class _Stopped(Exception):
    """A run that could not be mended any further."""


@contextlib.contextmanager
def _intercepted(model: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Inside, every module's forward is `call(path, forward, args, kwargs)`."""
    modules = dict(model.named_modules())
    own = {path: vars(m)["forward"] for path, m in modules.items() if "forward" in vars(m)}

    def through(path: str, forward: Forward) -> Forward:
        @functools.wraps(forward)
        def intercept(*args: Any, **kwargs: Any) -> Any:
            return call(path, forward, args, kwargs)

        return intercept

    try:
        for path, module in modules.items():
            module.forward = through(path, module.forward)
        yield
    finally:
        for path, module in modules.items():
            if path in own:
                module.forward = own[path]
            else:
                del module.forward


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
