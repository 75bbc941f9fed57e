"""The features of a pass, outside the model and for as long as they are needed; `hooks` brings them.

A pass is one call of the model or, begun by hand, a whole training step: with calls of the model on two views, in
evaluation, as a teacher under no_grad.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import version
from ..stages import Sums
from .masks import Call, MaskSelector
from .outputs import OutputSelector, select
from .paths import Path, inside_backward, quoted
from .taps import can_tap, tap


class State(Enum):
    """Where a recorder stands. ``RUNNING`` is also left behind by a forward that raised."""

    EMPTY = "no pass yet"
    RUNNING = "a pass is being recorded"
    COMPLETE = "a loss can be built"
    TAKEN = "it was built"
    RECURSIVE = "the model called itself"


class Stream:
    """Layers whose features follow one another, such as those of an encoder, and where their next feature goes.

    In a pass by hand a call is that of the outermost running module that contains all layers of the stream: the model,
    the wrapper of a trainer around it, or only the stack of blocks inside.
    """

    def __init__(self) -> None:
        self.reset(recording=False)

    def reset(self, recording: bool, depth: int = 0) -> None:
        """Forget everything; ``depth``: how many modules that contain the layers are running."""
        self.recording = recording
        self.path: Path | None = None  # of the running call; None until it has a feature
        self.outside: Path | None = None  # of what no call contains, in a pass by hand
        self.depth = depth
        self.handled: BaseException | None = None  # what was being handled when the call began
        self.mask: Tensor | None = None  # of the running call


class Recorder:
    """The features of the last recorded pass, path after path: one for each call and stream.

    A new pass drops what an earlier one left, so features of two passes never mix. In a pass by hand each call makes
    paths of its own, and layers that were called outside any call of what contains them make one path more, which comes
    first.
    """

    def __init__(
        self,
        output: OutputSelector | None = None,
        capture_eval: bool = False,
        tapping: bool = True,
        streams: int = 1,
        masks: Sequence[MaskSelector | None] = (),
        summing: Sums | None = None,
    ) -> None:
        self.output = output
        self.capture_eval = capture_eval
        self.tapping = tapping
        self.enabled = True
        self.masks = tuple(masks)  # for each stream, where the padding mask of a call comes from
        self.summing = summing  # what is summed of traced features, instead of keeping them
        self.ever = False  # whether any layer's hook was ever called
        self.streams = [Stream() for _ in range(streams)]
        self.clear()

    def clear(self, state: State = State.EMPTY, recording: bool = False, depth: int = 0) -> None:
        """Forget the features; ``state`` says why there are none."""
        self.state = state
        self.by_hand = False  # a pass that the user began, and that the model's own calls do not end
        self.raised = self.called = False  # whether a call of the pass by hand raised, or ended
        self.latest: Path | None = None  # the end of the chain of paths, in the order of their first features
        for stream in self.streams:
            stream.reset(recording, depth)

    # --- what was recorded ------------------------------------------------------------------------

    @property
    def paths(self) -> list[Path]:
        """Those that have features: outside any call first, then call after call."""
        chain = [] if self.latest is None else self.latest.chain()
        paths = [path for path in chain if not path.dropped]
        return sorted(paths, key=lambda path: not path.outside)

    @property
    def features(self) -> list[Tensor]:
        """The features of all paths."""
        return [feature for path in self.paths for feature in path.features]

    @property
    def path(self) -> Path:
        """The path that the last feature came to; an empty one if there is none."""
        return Path() if self.latest is None else self.latest

    def take(self, paths: Iterable[Path]) -> None:
        """A loss is built from these: what comes from outside any call makes a new path from here on."""
        taken = list(paths)
        for stream in self.streams:
            if any(stream.outside is path for path in taken):
                stream.outside = None

    # --- a pass begins and ends -------------------------------------------------------------------

    def begin_by_hand(self, within_forward: bool) -> None:
        """Start a pass of which calls of the model are only a part, or which runs within one."""
        self.clear(State.RUNNING, recording=self.enabled, depth=-1 if within_forward else 0)
        self.by_hand = self.enabled

    def end_by_hand(self) -> None:
        """Finish it."""
        if not self.by_hand:
            return
        self.by_hand = False
        for stream in self.streams:
            stream.recording = False
        if self.paths or self.called:
            self.state = State.COMPLETE
        elif not self.raised:
            self.state = State.EMPTY
        self.warn_if_several_calls(stacklevel=3)

    def warn_if_several_calls(self, stacklevel: int) -> None:
        """Warn of paths that look like several calls of the same layers."""
        for stream in self.streams:
            if stream.outside is not None:
                stream.outside.warn_if_several_calls(stacklevel + 1)

    def enter(self, streams: Sequence[int], whole: bool, training: bool, call: Call | None = None) -> None:
        """A module starts to run that contains all layers of these streams; ``whole``: it is the model; ``call``: what
        it is called with, where somebody selects masks."""
        wanted = self._wanted(training)
        if self.by_hand:
            for index in streams:
                self._enter_stream(self.streams[index], wanted, self._mask(index, call, wanted))
        elif whole and wanted:
            self.clear(State.RUNNING, recording=True)
            self.streams[0].handled = handled()
            for index, stream in enumerate(self.streams):
                stream.mask = self._mask(index, call, wanted)

    def _mask(self, index: int, call: Call | None, wanted: bool) -> Tensor | None:
        """The mask of a stream in a call, once for the outermost module."""
        inside = self.by_hand and self.streams[index].depth > 0
        selector = self.masks[index] if self.masks else None
        if call is None or selector is None or not wanted or inside:
            return None
        return call.mask(selector)

    def leave(self, streams: Sequence[int], whole: bool, training: bool) -> None:
        """It is done, or raised. Whatever layers compute from here on (recomputation, evaluation) is not recorded."""
        if self.by_hand:
            for index in streams:
                self._leave_stream(self.streams[index])
        elif whole and self.state is State.RUNNING:
            if not _raised_since(self.streams[0].handled):
                self.state = State.COMPLETE
            for stream in self.streams:
                stream.recording = False
                stream.handled = None
        elif whole and self.state is State.COMPLETE and self._wanted(training):
            # A second end without a begin in between: the model ran itself inside its own forward.
            self.clear(State.RECURSIVE)

    def _wanted(self, training: bool) -> bool:
        """Recomputation inside a backward pass is no call, nor is evaluation unless asked."""
        if not self.enabled or inside_backward():
            return False
        return self.capture_eval or (training and torch.is_grad_enabled())

    def _enter_stream(self, stream: Stream, wanted: bool, mask: Tensor | None) -> None:
        stream.depth += 1
        if stream.depth == 1:
            stream.mask = mask
            stream.handled = handled()
            stream.recording = wanted
            stream.path = None

    def _leave_stream(self, stream: Stream) -> None:
        if stream.depth < 1:
            return  # it ran before the pass began
        stream.depth -= 1
        if stream.depth == 0:
            if stream.recording:
                self._call_ended(stream, _raised_since(stream.handled))
            stream.path = stream.handled = None
            stream.recording = True

    def _call_ended(self, stream: Stream, raised: bool) -> None:
        """One that raised leaves no trace: what came after it in the step is a call of its own."""
        if not raised:
            self.called = True
        else:
            self.raised = True
            if stream.path is not None:
                stream.path.dropped = True

    # --- a feature --------------------------------------------------------------------------------

    def capture(self, index: int, name: str, module: nn.Module, output: Any, last: bool) -> None:
        """Record one call of one layer of a stream; ``last``: the last layer of it."""
        if self.by_hand and inside_backward():
            return  # recomputation: outside a call nothing else tells
        compiling = torch.compiler.is_compiling()
        feature = output
        if self.output is not None or type(output) is not Tensor or not output.is_floating_point():
            feature = select(self.output, name, module, output)
        stream = self.streams[index]
        path = stream.path if stream.path is not None else self._path(stream, index)
        if self.by_hand and not compiling and not path.names and feature.grad_fn is not None:
            feature.grad_fn.register_prehook(path.passed)
        if compiling:
            feature = path.check_while_traced(feature, last)
        else:
            path.traced.append(None)
        path.versions.append(None if compiling else version(feature))
        path.names.append(name)
        path.features.append(feature)
        if self.summing is not None and path.mask is None and (compiling or path.sums):
            path.sum_while_traced(self.summing)
        path.taps.append(tap(feature) if self.tapping and not compiling and can_tap(feature) else None)
        if not feature.requires_grad and not self.capture_eval and not torch.is_grad_enabled():
            path.without_autograd.append(name)
        self.ever = True

    def _path(self, stream: Stream, index: int) -> Path:
        """Where the next feature of a stream goes."""
        in_call = not self.by_hand or stream.depth > 0
        path = stream.path if in_call else stream.outside
        if path is None:
            path = self.latest = Path(index, earlier=self.latest, outside=not in_call)
            path.mask = stream.mask if in_call else None
            if in_call:
                stream.path = path
            else:
                stream.outside = path
        return path

    # --- what can be wrong ------------------------------------------------------------------------

    def check_complete(self) -> None:
        """Raise if there is no finished pass to build a loss from, saying which of the many reasons it is."""
        if not self.enabled:
            raise RuntimeError("FeatureFlow is disabled (enabled=False, or a WeightSchedule at weight 0)")
        if self.state is not State.COMPLETE:
            nothing = self.by_hand and not self.paths
            raise RuntimeError(f"FeatureFlow: {_INCOMPLETE[State.EMPTY if nothing else self.state]}")

    def check_features(self, paths: Sequence[Path], layers: Iterable[str], may_miss: bool) -> None:
        """Raise if a layer was never called, ran without autograd, or its feature was overwritten since."""
        layers = list(dict.fromkeys(layers))
        called = {name for path in paths for name in path.names}
        missing = [name for name in layers if name not in called]
        if missing and not (may_miss and self.ever):
            raise RuntimeError(
                f"FeatureFlow: {quoted(missing)} not called in the last forward ({len(missing)} of {len(layers)} "
                "layers). If layers are skipped at random or on purpose (LayerDrop, stochastic depth, early exit), "
                "pass missing='skip'; if it is never called, leave it out of layers=; if it was compiled "
                "separately, attach before torch.compile"
            )
        for path in paths:
            path.check()


_NOTHING_CAPTURED = """Possible reasons:
- the model ran in eval mode or under no_grad (FeatureFlow(..., capture_eval=True) records that too);
- a submodule was called instead of the model that FeatureFlow was given (begin_pass() ... end_pass() record that);
- the model, or one of the same structure, was compiled with torch.compile before attach(): attach first,
  or return the features from forward and call ffr_loss on them (works with fullgraph=True)."""

_INCOMPLETE = {
    State.EMPTY: "no forward pass was recorded.\n" + _NOTHING_CAPTURED,
    State.RUNNING: "the last forward did not finish (it raised, or loss() was called inside it); run the model's "
    "forward again before loss()",
    State.RECURSIVE: "the model called itself inside its own forward, which cannot be recorded",
    State.TAKEN: "loss() was already built from the last forward; it can be built once per forward (keep the returned "
    "tensor). If the model did run since, its hooks were not called: see below.\n" + _NOTHING_CAPTURED,
}


def handled() -> BaseException | None:
    """The exception whose `except` block is running. torch calls the hooks of a forward that raised from one; a step
    that tries again after an error may run in one itself."""
    return None if torch.compiler.is_compiling() else sys.exc_info()[1]


def _raised_since(before: BaseException | None) -> bool:
    now = handled()
    return now is not None and now is not before
