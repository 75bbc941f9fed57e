"""Forward hooks that collect the features of one forward pass, outside the model and for as long as they
are needed.

The model holds hook objects that hold a weak reference to the :class:`Recorder` and nothing else, so the
model can be copied, pickled and saved while hooks are attached (the copy's hooks do nothing), and dropping
the owner of the recorder makes the hooks inert.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import graph_task, version
from .paths import Path, quoted
from .taps import can_tap, tap

OutputSelector = int | str | Callable[[Any], Tensor]


class Recorder:
    """The features of the last recorded forward pass, in call order.

    ``state`` is ``"empty"`` (no pass yet), ``"open"`` (a forward is running, or raised half-way),
    ``"complete"``, ``"taken"`` (the loss was built from it) or ``"recursive"`` (the model called itself).
    A new pass drops what an earlier one left, so features of two passes never mix.

    A pass is one path, the features of one call of the model. A pass by hand has one for each call in it, and
    in front of these one for the layers that were called outside any call.
    """

    def __init__(
        self, output: OutputSelector | None = None, capture_eval: bool = False, tapping: bool = True
    ) -> None:
        self.output = output
        self.capture_eval = capture_eval
        self.tapping = tapping
        self.enabled = True
        self.by_hand = False  # a pass that the user began, and that the model's own calls do not end
        self.recording = False
        self.state = "empty"
        self.path = Path()  # where the next feature goes
        self.outside = self.path  # that of what no call contains
        self.latest = self.path
        self.paths = [self.path]  # of a pass by hand: at its end
        self.depth = 0  # how many modules that contain all layers are running; a call begins at 1
        self.raised = False  # whether a call of the pass by hand did
        self.handled: BaseException | None = None  # what the step was handling when the call began

    @property
    def names(self) -> list[str]:
        """The layers' names, one for each feature, path after path."""
        return [name for path in self.paths for name in path.names]

    @property
    def features(self) -> list[Tensor]:
        """The features of all paths."""
        return [feature for path in self.paths for feature in path.features]

    def requires_grad(self) -> bool:
        """Whether any feature does."""
        for path in self.paths:
            for feature in path.features:
                if feature.requires_grad:
                    return True
        return False

    def clear(self, state: str = "empty") -> None:
        """Forget the features; ``state`` says why there are none."""
        self.recording = self.by_hand = False
        self.state = state
        self.path = self.outside = self.latest = Path()
        self.paths = [self.path]

    def begin(self, training: bool) -> None:
        """Start a pass. Recomputation inside a backward pass starts none, nor does evaluation unless
        asked."""
        if not self.by_hand and self._wanted(training):
            self.clear("open")
            self.recording = True

    def _wanted(self, training: bool) -> bool:
        if not self.enabled or _inside_backward():
            return False
        return self.capture_eval or (training and torch.is_grad_enabled())

    def end(self, training: bool) -> None:
        """Finish a pass; whatever the layers compute from here on (recomputation, evaluation) is not
        recorded."""
        if self.by_hand:
            return
        if self.recording:
            self.recording = False
            self.state = "complete"
        elif self.state == "complete" and self._wanted(training):
            # A second end without a begin in between: the model ran itself inside its own forward.
            self.clear("recursive")

    def begin_by_hand(self, within_forward: bool) -> None:
        """Start a pass of which calls of the model are only a part, or which runs within one."""
        self.clear("open")
        self.recording = self.by_hand = self.enabled
        self.depth = -1 if within_forward else 0
        self.raised, self.handled = False, None

    def end_by_hand(self) -> None:
        """Finish it."""
        if not self.by_hand:
            return
        self.recording = self.by_hand = False
        self.paths = [path for path in self.latest.chain() if path.names]
        if self.paths:
            self.state = "complete"
        elif not self.raised:
            self.state = "empty"
        self.outside.warn_if_several_calls(stacklevel=3)

    def enter(self, training: bool, handled: BaseException | None) -> None:
        """A module that contains all layers starts to run in a pass by hand: a call begins, unless one
        is running. ``handled``: the exception that the step is handling meanwhile."""
        self.depth += 1
        if self.depth == 1:
            self.handled = handled
            self.recording = self._wanted(training)
            if self.recording:
                self.path = self.latest = Path(earlier=self.latest)

    def leave(self, handled: BaseException | None) -> None:
        """It is done. A call that raised leaves no trace: what came after it in the step is a call of its own."""
        if self.depth < 1:
            return  # it ran before the pass began
        self.depth -= 1
        if self.depth == 0:
            raised = handled is not None and handled is not self.handled
            self.handled = None
            if raised and self.recording:
                assert self.path.earlier is not None
                self.latest = self.path.earlier
                self.raised = True
            self.path = self.outside
            self.recording = True

    def capture(self, name: str, module: nn.Module, output: Any, last: bool) -> None:
        """Record one call of one layer; ``last``: the last of the selected layers."""
        if self.by_hand and _inside_backward():
            return  # recomputation: outside a call nothing else tells
        path = self.path
        feature = self.select(name, module, output)
        path.traced.append(torch.compiler.is_compiling())
        if torch.compiler.is_compiling():
            feature = path.check_while_traced(feature, last)
        else:
            path.versions.append(version(feature))
        path.names.append(name)
        path.features.append(feature)
        path.taps.append(tap(feature) if self.tapping and can_tap(feature) else None)
        if not torch.is_grad_enabled() and not self.capture_eval:
            path.without_autograd.append(name)

    def select(self, name: str, module: nn.Module, output: Any) -> Tensor:
        """The tensor that ``output=`` means, by default the first floating-point one in tuples, lists and
        mappings."""
        if callable(self.output):
            feature = self.output(output)
        elif self.output is None:
            feature = first_tensor(output)
        else:
            try:
                feature = _item(output, self.output)
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"output={self.output!r}: layer {name!r} ({type(module).__name__}) returned "
                    f"{_describe(output)}, "
                    "which has no such item"
                ) from error
        if not isinstance(feature, Tensor):
            raise TypeError(
                f"layer {name!r} ({type(module).__name__}) returned {_describe(output)}: expected a "
                f"floating-point tensor"
                f"{'' if self.output is None else f' at output={self.output!r}'}; choose one with output="
            )
        return feature

    def check_complete(self) -> None:
        """Raise if there is no finished pass to build a loss from, saying which of the many reasons it is."""
        if not self.enabled:
            raise RuntimeError("FeatureFlow is disabled (enabled=False, or a WeightSchedule at weight 0)")
        if self.state == "open":
            raise RuntimeError(
                "FeatureFlow: the last forward did not finish (it raised, or loss() was called inside it); "
                "run the model's forward again before loss()"
            )
        if self.state == "recursive":
            raise RuntimeError(
                "FeatureFlow: the model called itself inside its own forward, which cannot be recorded"
            )
        if self.state == "taken":
            raise RuntimeError(
                "FeatureFlow: loss() was already built from the last forward; it can be built once per "
                "forward "
                "(keep the returned tensor). If the model did run since, its hooks were not called: see "
                "below.\n" + _NOTHING_CAPTURED
            )
        if self.state == "empty":
            raise RuntimeError("FeatureFlow: no forward pass was recorded.\n" + _NOTHING_CAPTURED)

    def check_features(self, layers: Sequence[str]) -> None:
        """Raise if a layer was never called, ran without autograd, or its feature was overwritten since."""
        self.check_complete()
        called = self.paths[0].names if len(self.paths) == 1 else self.names
        missing = [name for name in layers if name not in called]
        if missing:
            raise RuntimeError(
                f"FeatureFlow: {quoted(missing)} not called in the last forward"
                f" ({len(missing)} of {len(layers)} layers); pass layers= without it, or, if it was compiled "
                "separately, attach before torch.compile"
            )
        for path in self.paths:
            path.check()


_NOTHING_CAPTURED = """Possible reasons:
- the model ran in eval mode or under no_grad (FeatureFlow(..., capture_eval=True) records that too);
- a submodule was called instead of the model that FeatureFlow was given (begin_pass() ... end_pass()
record that);
- the model, or one of the same structure, was compiled with torch.compile before attach(): attach first,
  or return the features from forward and call ffr_loss on them (works with fullgraph=True)."""


class LayerHook:
    """Forward hook of one layer: hands its output to the recorder while a pass is recorded."""

    def __init__(self, recorder: Recorder, name: str, last: bool) -> None:
        self.recorder = weakref.ref(recorder)
        self.name = name
        self.last = last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder()
        if recorder is not None and recorder.recording:
            recorder.capture(self.name, module, output, self.last)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, ())


class BeginHook:
    """Forward pre-hook of the model: a recorded pass starts here."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: Any) -> None:
        recorder = self.recorder()
        if recorder is None:
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "FeatureFlow does not work under nn.DataParallel, whose replicas run in threads: "
                "use DistributedDataParallel"
            )
        recorder.begin(module.training)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, ())


class EndHook:
    """Forward hook of the model: a recorded pass ends here."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder()
        if recorder is not None:
            recorder.end(module.training)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, ())


class Inert:
    """What the hooks become in a copy, a pickle or a checkpoint of the model: a hook that does nothing."""

    def __call__(self, *args: Any) -> None:
        return None


def output_selector(output: Any) -> OutputSelector | None:
    """`output` as a function or a plain index or key, of what is one of numpy's or a member of an enum; or
    TypeError."""
    if output is None or callable(output):
        selector: OutputSelector | None = output
        return selector
    if isinstance(output, str):
        return str.__str__(output)
    if isinstance(output, Integral) and not isinstance(output, bool):
        return int(output)
    raise TypeError(f"output: expected an index, a key or a function of a layer's output, got {output!r}")


def first_tensor(output: Any) -> Any:
    """The first floating-point tensor of a module's output, depth first; None if there is none.

    Hugging Face's ``ModelOutput`` is a mapping and a dataclass; its first field in order is the hidden state.
    """
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    items: Sequence[Any] = ()
    if isinstance(output, Mapping):
        items = list(output.values())
    elif isinstance(output, (tuple, list)):
        items = output
    for item in items:
        found = first_tensor(item)
        if found is not None:
            return found
    return None


def _item(output: Any, key: int | str) -> Any:
    if isinstance(key, str) and not isinstance(output, Mapping) and hasattr(output, key):
        return getattr(output, key)
    return output[key]


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"{type(output).__name__} with keys {list(output)}"
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {len(output)}"
    return f"a tensor of dtype {output.dtype}" if isinstance(output, Tensor) else type(output).__name__


def _inside_backward() -> bool:
    """Whether autograd is running a backward pass on this thread, where only recomputation calls a
    forward."""
    if torch.compiler.is_compiling():
        return False
    return graph_task() != -1
