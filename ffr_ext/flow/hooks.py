"""Forward hooks that tell a recorder of a model's calls and hand it the outputs of its layers.

One pair of hooks, :class:`Enter` and :class:`Leave`, tells where a call begins and ends; a third kind,
:class:`LayerHook`, brings the features.

The model holds hook objects that hold a weak reference to the :class:`Recorder` and nothing else, so the model can be
copied, pickled and saved while hooks are attached (the copy's hooks do nothing), and dropping the owner of the recorder
makes the hooks inert.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .masks import Call, positional
from .recorder import Recorder


class Inert:
    """What the hooks become in a copy, a pickle or a checkpoint of the model: a hook that does nothing."""

    def __call__(self, *args: Any) -> None:
        return None


class _Hook:
    def __init__(self, recorder: Recorder) -> None:
        self.recorder = weakref.ref(recorder)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, ())


class LayerHook(_Hook):
    """Forward hook of one layer: hands its output to the recorder while its stream is recorded."""

    def __init__(self, recorder: Recorder, stream: int, name: str, last: bool) -> None:
        super().__init__(recorder)
        self.stream = stream
        self.name = name
        self.last = last

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder()
        if recorder is not None and recorder.streams[self.stream].recording:
            recorder.capture(self.stream, self.name, module, output, self.last)


class _CallHook(_Hook):
    """Of a module that contains all layers of some streams."""

    def __init__(self, recorder: Recorder, module: nn.Module, streams: Sequence[int], whole: bool) -> None:
        super().__init__(recorder)
        self.module = weakref.ref(module)
        self.streams = tuple(streams)
        self.whole = whole


class Enter(_CallHook):
    """Forward pre-hook: a call begins."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.begin(module, None)

    def begin(self, module: nn.Module, call: Call | None) -> None:
        """Tell the recorder."""
        recorder = self.recorder()
        if recorder is None:
            return
        if not torch.compiler.is_compiling() and module is not self.module():
            raise RuntimeError(
                "FeatureFlow does not work under nn.DataParallel, whose replicas run in threads: use "
                "DistributedDataParallel"
            )
        recorder.enter(self.streams, self.whole, module.training, call)


class EnterWithArguments(Enter):
    """The same where masks are selected from what the call is given."""

    def __init__(self, recorder: Recorder, module: nn.Module, streams: Sequence[int], whole: bool) -> None:
        super().__init__(recorder, module, streams, whole)
        self.names = positional(module)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        self.begin(module, Call(module, self.names, args, kwargs or {}))


class Leave(_CallHook):
    """Forward hook, called also when the forward raised: the call ends."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder()
        if recorder is not None:
            recorder.leave(self.streams, self.whole, module.training)


def watch_layers(recorder: Recorder, streams: Sequence[Mapping[str, nn.Module]]) -> list[RemovableHandle]:
    """Let the layers bring their outputs."""
    handles = []
    for index, layers in enumerate(streams):
        last = list(layers)[-1]
        for name, module in layers.items():
            handles.append(module.register_forward_hook(LayerHook(recorder, index, name, name == last)))
    return handles


def watch_calls(
    recorder: Recorder, model: nn.Module, streams: Sequence[Mapping[str, nn.Module]], inner: bool
) -> list[RemovableHandle]:
    """Let calls of the model, or of the modules `inner` to it that contain all layers of a stream, tell where they
    begin and end."""
    handles: list[RemovableHandle] = []
    for module in model.modules():
        if (module is model) == inner:
            continue
        inside = set(module.modules()) - {module}
        held = [index for index, layers in enumerate(streams) if inside.issuperset(layers.values())]
        if held or not inner:
            # In front: a hook that raises before it would let a call end that has not begun.
            leave = Leave(recorder, module, held, not inner)
            kind = EnterWithArguments if recorder.masks else Enter
            enter: Any = kind(recorder, module, held, not inner)
            handles.append(
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=bool(recorder.masks))
            )
            handles.append(module.register_forward_hook(leave, always_call=True))
    return handles
