"""FFR's own open choices, and what its best recipe owes to which part; `ffr` itself is the package's default."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from examples.common.models import flow_layers
from ffr_ext import FeatureFlow

from .methods import FEATURES, METHODS, Method, ffr, slimming, together

WEIGHTS = METHODS["ffr"].strengths
BOTH = METHODS["ffr+slimming"].strengths
SMALL = (0.1, 0.3, 1.0, 3.0)  # of penalties that are some ten times larger: angles, three times the features


def _with(shares: tuple[float, float] = (1.0, 1.0), **options: Any) -> Any:
    def make(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
        return ffr(model, example, strength, shares=shares, **options)

    return make


def _inner(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    """The outputs of the norms inside the blocks too, in depth order."""
    points = set(flow_layers(model))
    layers = [n for n, m in model.named_modules() if n in points or isinstance(m, nn.BatchNorm2d)]
    return ffr(model, example, strength, layers=layers)


def _deeper(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    """The weight of a term grows with its depth, from the first to the last, and is `strength` in the mean."""
    (flow,) = ffr(copy.deepcopy(model), example, strength)
    with flow:
        flow.model.train()(example)
        terms = flow.terms()
    growing = [_growing(len(values), strength) for values in (terms.gradient, terms.curvature)]
    return [FeatureFlow(model, flow_layers(model), gradient=growing[0], curvature=growing[1])]


def _growing(terms: int, mean: float) -> list[float]:
    return [2 * mean * (index + 1) / (terms + 1) for index in range(terms)]


class ChannelFlow(FeatureFlow):
    """Plain PyTorch, for a question only: the differences' l2 norm over each channel's positions, as a group lasso has
    it, divided by the root of their number; the mean over samples and channels."""

    def loss(self) -> Tensor:
        self._end_with_loss()
        features = [feature for _, feature in self.captured()]
        self.after_backward()
        differences = [b - a if a.shape == b.shape else None for a, b in itertools.pairwise(features)]
        penalty = features[0].new_zeros(())
        for weight, terms in ((self.gradient, differences), (self.curvature, _second(differences))):
            for difference in terms:
                if difference is not None:
                    penalty = penalty + weight * _channel_norm(difference)
        return self.scale * penalty


def _second(first: Sequence[Tensor | None]) -> list[Tensor | None]:
    pairs = itertools.pairwise(first)
    return [None if a is None or b is None else b - a for a, b in pairs]


def _channel_norm(difference: Tensor) -> Tensor:
    return (difference.flatten(2).square().mean(2) + 1e-12).sqrt().mean()


def _channels(model: nn.Module, example: Tensor, strength: float) -> list[Any]:
    return [ChannelFlow(model, flow_layers(model), gradient=strength, curvature=strength)]


ABLATION = {
    method.name: method
    for method in (
        METHODS["ffr"],
        Method("ffr-l2", FEATURES, WEIGHTS, _with(norm="l2")),
        Method("ffr-l2-squared", FEATURES, WEIGHTS, _with(norm="l2_squared")),
        Method("ffr-l2-channels", FEATURES, WEIGHTS, _channels),
        Method("ffr-angle", FEATURES, SMALL, _with(curvature_kind="angle")),
        Method("ffr-length-only", FEATURES, WEIGHTS, _with(shares=(1.0, 0.0))),
        Method("ffr-curvature-only", FEATURES, WEIGHTS, _with(shares=(0.0, 1.0))),
        Method("ffr-pool", FEATURES, WEIGHTS, _with(transition="pool")),
        Method("ffr-inner", "features, inner too", SMALL, _inner),
        Method("ffr-deeper", FEATURES, WEIGHTS, _deeper),
        Method("ffr-ramp", FEATURES, WEIGHTS, ffr, ramp=0.5),
        Method("ffr-little-decay", FEATURES, WEIGHTS, ffr, weight_decay=lambda strength: 5e-4),
        METHODS["slimming"],
        METHODS["ffr+slimming"],
        Method(
            "length+slimming",
            "features and scales",
            BOTH,
            together(_with(shares=(1.0, 0.0)), slimming, 1e-2),
        ),
        Method(
            "curvature+slimming",
            "features and scales",
            BOTH,
            together(_with(shares=(0.0, 1.0)), slimming, 1e-2),
        ),
    )
}

ALL = {**METHODS, **ABLATION}
