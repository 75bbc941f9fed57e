"""A path: the features of one call of a model's layers, and what has to be known of them to build a loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _torch, checks
from ..compiled import Part, newest_sums, stats_of, to_leave_graph
from ..stages import Stage, Sums
from .taps import Slot

_CHECKPOINT_ADVICE = (
    "the penalty's gradient would silently vanish. With activation checkpointing pass use_reentrant=False "
    "(Hugging Face: gradient_checkpointing_kwargs={'use_reentrant': False}), or choose layers that are not called "
    "inside what is checkpointed; under torch.no_grad() choose other layers; between begin_pass() and end_pass() "
    "call a module that contains all captured layers, whose calls without autograd are left out"
)


class Path:
    """The features of one call, in the order in which the layers made them.

    ``earlier`` is the path before it in the pass. A list of paths would have torch.compile trace anew for
    each number of calls, since it guards on the length of a list that it appends to.

    Attributes:
        stream: which of the model's streams the layers belong to.
        streams: of a joined path all of them.
        outside: whether no call contains it.
        dropped: whether its call raised; it is no part of the pass then.
        points: the nodes of autograd's graph that made the features, once they have been let go.
        penalty: what was built of it and others for a backward pass.
        passed: tells whether a backward pass went through it.
        mask: which positions count, where padding does not.
        sums: for each feature of a traced call what differences with those before it add to the sums of its stage, made
            in its graph; features that no later one needs are then without values.
    """

    def __init__(self, stream: int = 0, earlier: Path | None = None, outside: bool = False) -> None:
        self.stream = stream
        self.streams = {stream}
        self.earlier = earlier
        self.outside = outside
        self.dropped = False
        self.names: list[str] = []
        self.features: list[Tensor] = []
        self.taps: list[tuple[Slot, Tensor] | None] = []
        self.versions: list[int | None] = []  # None: nobody counts, or a traced counter tells
        # For each feature that torch.compile traced the graph it was captured in, and its version there.
        self.traced: list[tuple[str, Any] | None] = []
        self.overwritten: list[tuple[str, Any]] = []
        self.without_autograd: list[str] = []
        self.points: set[Any] = set()
        self.penalty: Tensor | None = None
        self.passed = Passed()
        self.mask: Tensor | None = None
        self.sums: list[Part] = []

    def chain(self) -> list[Path]:
        """The paths of the pass up to this one."""
        paths = [self]
        while paths[-1].earlier is not None:
            paths.append(paths[-1].earlier)
        return paths[::-1]

    def check_while_traced(self, feature: Tensor, last: bool) -> Tensor:
        """Note whether earlier features were overwritten, without branching: a traced version counter is a
        symbol.

        It means nothing outside its graph (the graph's outputs start from version 0 again), so this is the
        place to look: at the two features before this one, at the last layer at all. Nobody looks after
        the last, so that is copied; and what is copied anyway, to leave the graph as it lies there, keeps the
        value that it had here. Where processes train together all are copied: under DistributedDataParallel
        Dynamo cuts the graph at its buckets, and no counter crosses a cut.
        """
        if dist.is_available() and dist.is_initialized():
            self.traced.append(None)
            return to_leave_graph(feature, copied=True)
        graph = _torch.graph_in_work()
        first = 0 if last else max(len(self.traced) - 2, 0)
        for index in range(first, len(self.traced)):
            traced = self.traced[index]
            if traced is not None and traced[0] == graph:
                now = _torch.traced_version(self.features[index])
                self.overwritten.append((self.names[index], now != traced[1]))
        feature = to_leave_graph(feature, copied=last)
        self.traced.append((graph, _torch.traced_version(feature)))
        return feature

    def sum_while_traced(self, sums: Sums) -> None:
        """Sum what the newest feature adds, in the graph that made it. As outputs of the graph all features would be
        written once more, and their gradients written and read; sums become part of the loops that make features and of
        those that read them."""
        *before, newest = self.features[-3:]
        if len(self.sums) < len(self.features) - 1 or (not self.sums and newest.device.type != "cpu"):
            return
        near: list[Tensor] = []
        for feature in before[::-1]:
            if feature.shape != newest.shape:
                break
            near.insert(0, feature)
        checks.check_one_device(len(self.features) - 1 - len(near), [*near, newest])
        self.sums += newest_sums([*near, newest], sums) if near else [()]
        if len(before) == 2:
            shape, dtype, device = before[0].shape, before[0].dtype, before[0].device
            self.features[-3] = torch.empty((), dtype=dtype, device=device).expand(shape)
            self.traced[-3] = self.versions[-3] = None

    def stats(self, stages: Sequence[Stage]) -> Tensor:
        """The sums of these stages, as the kernels give them."""
        parts = [part for stage in stages for part in self.sums[stage.first : stage.first + stage.own]]
        return stats_of(parts, [stage.own for stage in stages])

    def outputs(self) -> str:
        """The features with their layers, for a message."""
        listed = [f"{name} {tuple(f.shape)}" for name, f in zip(self.names, self.features, strict=True)]
        return ", ".join(listed[:12]) + (f" and {len(listed) - 12} more" if len(listed) > 12 else "")

    def check(self) -> None:
        """Raise if a layer ran without autograd, or its feature was overwritten since."""
        if self.without_autograd:
            raise RuntimeError(
                f"FeatureFlow: {quoted(self.without_autograd)} ran without autograd in a training forward, so "
                + _CHECKPOINT_ADVICE
            )
        for name, overwritten in self.overwritten:
            if overwritten:
                raise _overwritten(name)
        for name, feature, version in zip(self.names, self.features, self.versions, strict=False):
            if version is not None and _torch.version(feature) != version:
                raise _overwritten(name)

    def warn_if_several_calls(self, stacklevel: int) -> None:
        """Warn if every layer was called the same number of times, more than once, one round after another."""
        layers = list(dict.fromkeys(self.names))
        rounds = len(self.names) // max(len(layers), 1)
        if len(layers) > 1 and rounds > 1 and self.names == layers * rounds:
            warnings.warn(
                f"FeatureFlow: all {len(layers)} layers were called {rounds} times in one pass, outside any call "
                "of a module that contains them. A round that autograd's graph shows not to depend on the one before "
                "is a path of its own; any other goes on with the path, with terms between the end of one round and "
                "the start of the next. If these are calls on different inputs, better call such a module (each of "
                "its calls is a path of its own), or give each a pass and a loss() of its own",
                stacklevel=stacklevel + 1,
            )

    def requires_grad(self) -> bool:
        """Whether any feature does, or did before it was let go."""
        return bool(self.points) or any(tensor.requires_grad for tensor in self._differentiable())

    def nodes(self) -> set[Any]:
        """The nodes of autograd's graph that made the features: a loss whose graph has one of them depends on it."""
        return self.points or {t.grad_fn for t in self._differentiable() if t.grad_fn is not None}

    def _differentiable(self) -> list[Tensor]:
        return self.features + [made for part in self.sums for made in part]

    def release(self) -> None:
        """Let go of the features, and keep what tells which losses depend on them."""
        self.points = self.nodes()
        self.features, self.taps, self.versions, self.sums = [], [], [], []


class Passed:
    """Pre-hook of the node that made a feature: notes that a backward pass reached it."""

    def __init__(self) -> None:
        self.noted = False

    def __call__(self, _gradients: Any) -> None:
        self.noted = True


def independent(path: Path) -> list[Path]:
    """`path` cut where a round of its layers does not depend on the round before: a module that was called twice, on
    two inputs, in one call of the model. A recurrent module, whose second call reads what the first one made, is one
    path. Where autograd has no graph to tell (compiled, or without gradients) nothing is cut.
    """
    if len(set(path.names)) == len(path.names):
        return [path]
    cuts, seen = [0], set[str]()
    for index, name in enumerate(path.names):
        if name in seen:
            seen.clear()
            if not _follows(path.features[index], path.features[index - 1]):
                cuts.append(index)
        seen.add(name)
    if len(cuts) == 1:
        return [path]
    return [_part(path, slice(a, b)) for a, b in zip(cuts, [*cuts[1:], None], strict=True)]


def _follows(later: Tensor, earlier: Tensor) -> bool:
    if earlier.grad_fn is None or later.grad_fn is None:
        return True
    return earlier.grad_fn is later.grad_fn or reached(later, [{earlier.grad_fn}])[0]


def joined(paths: Iterable[Path], apart: Callable[[Path, Path], bool]) -> list[Path]:
    """One path for neighbours that are of different streams of one call and not to be kept `apart`: one pass over the
    features instead of many, with the same terms."""
    paths = list(paths)
    if len(paths) < 2:
        return paths
    results: list[Path] = []
    for path in paths:
        alike = bool(results) and results[-1].mask is path.mask
        alike = alike and bool(results[-1].sums) == bool(path.sums)
        if alike and path.stream not in results[-1].streams and not apart(results[-1], path):
            last = results[-1]
            last.streams.add(path.stream)
            last.names += path.names
            last.features += path.features
            last.taps += path.taps
            last.sums += path.sums
        else:
            results.append(_part(path, slice(None)))
    return results


def _part(path: Path, part: slice) -> Path:
    result = Path(path.stream, outside=path.outside)
    result.mask, result.sums = path.mask, path.sums[part]
    result.names, result.features, result.taps = path.names[part], path.features[part], path.taps[part]
    return result


def reached(loss: Tensor, wanted: Sequence[set[Any]]) -> list[bool]:
    """For each of these sets of nodes whether the graph of `loss` has one of them. Breadth first, since features are
    near the loss; the walk stops when it has one of each."""
    missing = dict(enumerate(wanted))
    layer = [loss.grad_fn] if loss.grad_fn is not None else []
    seen: set[Any] = set(layer)
    while layer and missing:
        missing = {index: nodes for index, nodes in missing.items() if nodes.isdisjoint(layer)}
        following = []
        for node in layer:
            for parent, _ in node.next_functions:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    following.append(parent)
        layer = following
    return [index not in missing for index in range(len(wanted))]


def quoted(names: Sequence[str]) -> str:
    """`layer 'a'` or `layers 'a', 'b', 'c', ...`, for messages."""
    shown = ", ".join(repr(name) for name in names[:3])
    return f"layer {shown}" if len(names) == 1 else f"layers {shown}{', ...' if len(names) > 3 else ''}"


def _overwritten(name: str) -> RuntimeError:
    return RuntimeError(
        f"FeatureFlow: the output of layer {name!r} was overwritten in place after it was captured (an in-place "
        "activation or +=); use inplace=False there, or choose the layer that overwrites it"
    )


def inside_backward() -> bool:
    """Whether autograd is running a backward pass on this thread, where only recomputation calls a forward."""
    return not torch.compiler.is_compiling() and _torch.graph_task() != -1
