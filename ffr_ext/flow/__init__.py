"""Feature flow of a model you do not want to rewrite: which layers, their features, and gradients just in time."""

from __future__ import annotations

from .describe import Description
from .feature_flow import FeatureFlow
from .layers import LayerSpec, select_layers

__all__ = ["Description", "FeatureFlow", "LayerSpec", "select_layers"]
