"""Calls in a pass by hand: which modules tell where a call of the model begins and ends.

A pass by hand is a whole training step, which may call the model more than once: on two views, in evaluation, as a
teacher under no_grad. Each call is a path of its own. A call is that of the outermost running module that contains all
captured layers, so it does not matter whether the step calls the model, the wrapper of a trainer around it, or only the
stack of blocks inside.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .capture import Inert, Recorder


def holders(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """`model` and the modules inside it that contain all of `layers`."""
    wanted = set(layers)
    return [module for module in model.modules() if wanted <= set(module.modules()) - {module}]


def watch_calls(recorder: Recorder, model: nn.Module, layers: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Let calls of the modules that contain all of `layers` begin and end calls of a pass by hand."""
    handles: list[RemovableHandle] = []
    for module in holders(model, layers):
        # In front: a hook that raises before it would let the call end that has not begun.
        handles.append(module.register_forward_pre_hook(EnterHook(recorder), prepend=True))
        handles.append(module.register_forward_hook(LeaveHook(recorder), always_call=True))
    return handles


def handled() -> BaseException | None:
    """The exception whose `except` block is running. torch calls the hooks of a forward that raised from one; a step
    that tries again after an error may run in one itself."""
    return None if torch.compiler.is_compiling() else sys.exc_info()[1]


class EnterHook:
    """Forward pre-hook of a module that contains all layers."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: Any) -> None:
        recorder = self.recorder()
        if recorder is not None and recorder.by_hand:
            recorder.enter(module.training, handled())

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, ())


class LeaveHook:
    """Forward hook of a module that contains all layers, called also when its forward raised."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = weakref.ref(recorder)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        recorder = self.recorder()
        if recorder is not None and recorder.by_hand:
            recorder.leave(handled())

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, ())
