"""Validation of what users pass in, and its messages. Every message names the argument,
what was expected, what came.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def at_least_one(name: str, value: Any) -> int:
    """`value` as an int; ValueError unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)


def feature_list(features: Iterable[Tensor]) -> list[Tensor]:
    """`features` as a list of floating-point tensors of rank >= 1, or TypeError/ValueError naming the index."""
    if isinstance(features, Tensor):
        raise TypeError(
            "features: expected an iterable of tensors in depth order, got one Tensor of shape "
            f"{tuple(features.shape)}; for features stacked along dim 0 pass features.unbind(0)"
        )
    if not isinstance(features, (list, tuple)) and isinstance(features, Mapping):
        raise TypeError("features: expected an iterable of tensors, got a mapping; pass its .values()")
    try:
        listed = list(features)
    except TypeError:
        raise TypeError(
            f"features: expected an iterable of tensors in depth order, got {type(features).__name__}"
        ) from None
    for index, feature in enumerate(listed):
        if not isinstance(feature, Tensor):
            raise TypeError(f"features[{index}]: expected a Tensor, got {type(feature).__name__}")
        if feature.dtype not in FEATURE_DTYPES:
            raise TypeError(
                f"features[{index}]: expected dtype float16, bfloat16, float32 or float64, got {feature.dtype}"
            )
        if feature.ndim == 0:
            raise ValueError(
                f"features[{index}]: expected rank >= 1 with the batch first, got a 0-dim tensor"
            )
        if feature.layout != torch.strided:
            raise TypeError(
                f"features[{index}]: expected a dense (strided) tensor, got layout {feature.layout}"
            )
    return listed


def check_has_terms(shapes: Sequence[tuple[int, ...]], gradient_terms: int) -> None:
    """ValueError when the features give no term at all: a penalty that is silently zero would train nothing."""
    if gradient_terms:
        return
    if len(shapes) < 2:
        raise ValueError(
            f"features: expected at least two features, got {len(shapes)}: there is no difference to penalise"
        )
    raise ValueError(
        "features: no two neighbours have the same shape, so there is no difference to penalise; got shapes "
        f"{', '.join(str(tuple(s)) for s in shapes)}. Choose layers inside a stage, or pass transition='pool'"
    )


def check_mappable(index: int, earlier: Sequence[int], later: Sequence[int]) -> None:
    """ValueError unless a feature of shape `earlier` can be pooled and padded to shape `later`
    (`transition="pool"`).
    """

    def refuse(reason: str) -> None:
        raise ValueError(
            f"transition='pool' cannot map features[{index}] of shape {tuple(earlier)} to features[{index + 1}] of "
            f"shape {tuple(later)}: {reason}"
        )

    if len(earlier) != len(later):
        refuse(f"ranks differ ({len(earlier)} and {len(later)})")
    if earlier[0] != later[0]:
        refuse(f"batch sizes differ ({earlier[0]} and {later[0]})")
    if len(earlier) > 1 and later[1] < earlier[1]:
        refuse(
            f"channels go down from {earlier[1]} to {later[1]}; only zero-padding to more channels is defined"
        )
    for axis in range(2, len(earlier)):
        if later[axis] == 0 or earlier[axis] % later[axis]:
            refuse(f"size {earlier[axis]} of dim {axis} is not a whole multiple of {later[axis]}")


def check_one_device(first: int, stage: Sequence[Tensor]) -> None:
    """ValueError naming the indices when neighbours of one stage live on different devices."""
    for offset, feature in enumerate(stage[1:], start=1):
        if feature.device != stage[0].device:
            raise ValueError(
                f"features[{first}] is on {stage[0].device} and features[{first + offset}] on {feature.device}: "
                "features of one stage must share a device; move them with .to(device) first"
            )


def position_mask(mask: Any, stages: Iterable[tuple[int, tuple[int, ...]]]) -> Tensor:
    """`mask` as a bool tensor, if it fits the leading dimensions of the features of all stages: of each the index of
    its first feature and the shape."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a bool tensor, got {type(mask).__name__}")
    if mask.dtype.is_floating_point or mask.is_complex():
        raise TypeError(
            f"mask: expected a bool or integer tensor, True or 1 where a position counts, got dtype {mask.dtype}"
        )
    sizes = tuple(mask.shape)
    for index, shape in stages:
        fits = 0 < len(sizes) <= len(shape)
        if not fits or any(m not in (1, n) for m, n in zip(sizes, shape, strict=False)):
            raise ValueError(
                f"mask: expected the leading dimensions of features[{index}] of shape {shape}, got a mask of "
                f"shape {sizes}"
            )
    return mask if mask.dtype == torch.bool else mask != 0


def term_weights(name: str, weight: Any, count: int) -> float | list[float] | Tensor:
    """A weight argument as a float, a list of `count` floats or a 1-D tensor of `count` entries."""
    if isinstance(weight, (int, float)) and not isinstance(weight, bool):
        # Traced with dynamic sizes a float can be symbolic; its value is not known then.
        return weight if torch.compiler.is_compiling() else _checked(name, float(weight))
    if isinstance(weight, Tensor):
        if weight.dim() > 1 or (weight.dim() == 1 and weight.shape[0] != count):
            raise ValueError(
                f"{name}: expected a float or one weight per term ({count}), got a tensor of "
                f"shape {tuple(weight.shape)}"
            )
        if weight.dtype == torch.bool or weight.is_complex():
            raise TypeError(f"{name}: expected a tensor of real numbers, got dtype {weight.dtype}")
        return weight
    if hasattr(weight, "tolist"):  # numpy's numbers and arrays
        return term_weights(name, weight.tolist(), count)
    if not isinstance(weight, Sequence) or isinstance(weight, (str, bytes, bytearray)):
        raise TypeError(f"{name}: expected a float, a sequence of floats or a 1-D tensor, got {weight!r}")
    weights = [_finite(f"{name}[{i}]", w) for i, w in enumerate(weight)]
    if len(weights) != count:
        raise ValueError(f"{name}: expected one weight per term ({count}), got {len(weights)}")
    return weights


def _finite(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name}: a tensor that requires grad would lose its gradient in a sequence; pass all weights as one "
            "1-D tensor (torch.stack)"
        )
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return _checked(name, float(value))


def _checked(name: str, number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number
