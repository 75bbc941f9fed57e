"""What the trainers share: regularizers as users give them, and what of them is logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..flow.feature_flow import FeatureFlow
from ..functional import FlowTerms
from ..regularizers.base import Regularizer

# One that is made, or a function of the model that makes one.
Spec = Regularizer | Callable[[nn.Module], Regularizer]


def specs(regularizers: Spec | Iterable[Spec] | None) -> list[Spec]:
    """One or several, as a list.

    Raises:
        TypeError: one is neither a regularizer nor a function.
    """
    if regularizers is None:
        return []
    listed: list[Any] = list(regularizers) if isinstance(regularizers, (list, tuple)) else [regularizers]
    for index, spec in enumerate(listed):
        if not isinstance(spec, Regularizer) and not callable(spec):
            raise TypeError(
                f"regularizers[{index}]: expected a regularizer, or a function (model) -> regularizer, got "
                f"{type(spec).__name__}"
            )
    return listed


def made(regularizers: Sequence[Spec], model: nn.Module) -> list[Regularizer]:
    """The regularizers of a model."""
    result = []
    for index, spec in enumerate(regularizers):
        regularizer = spec if isinstance(spec, Regularizer) else spec(model)
        if not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"regularizers[{index}]: expected a function (model) -> regularizer, got one that returned "
                f"{type(regularizer).__name__}"
            )
        result.append(regularizer)
    return result


def flows(regularizers: Iterable[Regularizer]) -> list[FeatureFlow]:
    """Those that are feature flows."""
    return [each for each in regularizers if isinstance(each, FeatureFlow)]


def named_terms(regularizer: Regularizer) -> dict[str, Tensor]:
    """The terms of any regularizer by name: of a flow ``length/0``, ``length/1``, ..., ``curvature/0``, ..."""
    terms = regularizer.terms()
    if not isinstance(terms, FlowTerms):
        return dict(terms)
    kinds = (("length", terms.gradient), ("curvature", terms.curvature))
    return {f"{kind}/{index}": value for kind, values in kinds for index, value in enumerate(values)}


def owned(regularizer: Regularizer, optimizers: Sequence[Any]) -> int:
    """Which of the optimizers has the parameters of a penalty of weights.

    Raises:
        ValueError: they are spread over several: no single step could take the penalty's gradient.
    """
    places = {
        id(parameter): index
        for index, optimizer in enumerate(optimizers)
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = {places[id(p)] for p in regularizer.parameters() if id(p) in places}
    if len(found) > 1:
        raise ValueError(
            f"{type(regularizer).__name__}: its parameters belong to {len(found)} optimizers, which step at different "
            "times; give each optimizer's part of the model a regularizer of its own"
        )
    if not found:
        raise ValueError(f"{type(regularizer).__name__}: none of its parameters belongs to an optimizer")
    return found.pop()
