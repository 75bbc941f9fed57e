"""Which part of a layer's output is its feature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor, nn

OutputSelector = int | str | Callable[[Any], Tensor]


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


def select(selector: OutputSelector | None, name: str, module: nn.Module, output: Any) -> Tensor:
    """The tensor that ``output=`` means, by default the first floating-point one in tuples, lists and mappings."""
    if callable(selector):
        feature = selector(output)
    elif selector is None:
        feature = first_tensor(output)
    else:
        try:
            feature = _item(output, selector)
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"output={selector!r}: layer {name!r} ({type(module).__name__}) returned {_describe(output)}, "
                "which has no such item"
            ) from error
    if not isinstance(feature, Tensor):
        where = "" if selector is None else f" at output={selector!r}"
        raise TypeError(
            f"layer {name!r} ({type(module).__name__}) returned {_describe(output)}: expected a floating-point "
            f"tensor{where}; choose one with output="
        )
    return feature


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
