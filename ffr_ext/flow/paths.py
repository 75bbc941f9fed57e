"""A path: the features of one call of a model, and what has to be known of them to build a loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from .. import _torch
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
    """

    def __init__(self, earlier: Path | None = None) -> None:
        self.earlier = earlier
        self.names: list[str] = []
        self.features: list[Tensor] = []
        self.taps: list[tuple[Slot, Tensor] | None] = []
        self.versions: list[int | None] = []
        self.traced: list[bool] = []
        self.overwritten: list[tuple[str, bool]] = []
        self.without_autograd: list[str] = []

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
        place to look: at the feature before this one, at the last layer at all of them. Nobody looks after
        the last, so that is copied.
        """
        for index in range(0 if last else max(len(self.names) - 1, 0), len(self.names)):
            version = self.versions[index]
            if version is not None and self.traced[index]:
                self.overwritten.append((self.names[index], _torch.version(self.features[index]) != version))
        feature = feature.clone() if last else feature
        self.versions.append(_torch.version(feature))
        return feature

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
        for name, feature, version, traced in zip(
            self.names, self.features, self.versions, self.traced, strict=True
        ):
            if not traced and version is not None:
                self.overwritten.append((name, _torch.version(feature) != version))
        for name, overwritten in self.overwritten:
            if overwritten:
                raise RuntimeError(
                    f"FeatureFlow: the output of layer {name!r} was overwritten in place after it was "
                    f"captured (an "
                    "in-place activation or +=); use inplace=False there, or choose the layer that "
                    "overwrites it"
                )

    def warn_if_several_calls(self, stacklevel: int) -> None:
        """Warn if every layer was called the same number of times, more than once, one round after another."""
        layers = list(dict.fromkeys(self.names))
        rounds = len(self.names) // max(len(layers), 1)
        if len(layers) > 1 and rounds > 1 and self.names == layers * rounds:
            warnings.warn(
                f"FeatureFlow: all {len(layers)} layers were called {rounds} times in one pass, outside any call "
                "of a module that contains them. Their features make one path, with terms between the end of "
                "one round and the start of the next. If these are calls on different inputs, call such a "
                "module (each of its calls is a path of its own), or give each a pass and a loss() of its own",
                stacklevel=stacklevel + 1,
            )


def quoted(names: Sequence[str]) -> str:
    """`layer 'a'` or `layers 'a', 'b', 'c', ...`, for messages."""
    shown = ", ".join(repr(name) for name in names[:3])
    return f"layer {shown}" if len(names) == 1 else f"layers {shown}{', ...' if len(names) > 3 else ''}"
