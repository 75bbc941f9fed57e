"""Where the padding mask of a call comes from."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

# The name of an argument of the call, or a function of all of them.
MaskSelector = str | Callable[..., Tensor | None]


def mask_selectors(mask: Any, streams: int) -> tuple[MaskSelector | None, ...]:
    """One for each stream; none at all if there is no mask.

    Raises:
        TypeError: one is neither a name nor a function.
        ValueError: a list of another length than there are paths.
    """
    if mask is None:
        return ()
    selectors = tuple(mask) if isinstance(mask, (list, tuple)) else (mask,) * streams
    for selector in selectors:
        if selector is not None and not isinstance(selector, str) and not callable(selector):
            raise TypeError(
                "mask: expected the name of an argument of the call or a function of its arguments, got "
                f"{type(selector).__name__}"
            )
    if len(selectors) != streams:
        raise ValueError(f"mask: expected one for each of the {streams} paths, got {len(selectors)}")
    return selectors


class Call:
    """What a module is called with; `names`: of the arguments that can be given by position."""

    def __init__(
        self, module: nn.Module, names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.module, self.names, self.args, self.kwargs = module, names, args, kwargs

    def mask(self, selector: MaskSelector) -> Tensor | None:
        """The mask that a selector means; None where the call was given none."""
        mask = self._argument(selector) if isinstance(selector, str) else selector(*self.args, **self.kwargs)
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"mask={selector!r}: expected a tensor or None of the call of {type(self.module).__name__}, got "
                f"{type(mask).__name__}"
            )
        return mask

    def _argument(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        if name in self.names:
            index = self.names.index(name)
            return self.args[index] if index < len(self.args) else None
        raise ValueError(
            f"mask={name!r}: {type(self.module).__name__}, which was called, has the arguments "
            f"{', '.join([*self.names, *self.kwargs])}"
        )


def positional(module: nn.Module) -> list[str]:
    """The names of the arguments of its `forward` that can be given by position."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
