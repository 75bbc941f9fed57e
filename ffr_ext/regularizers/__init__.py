"""Neighbours of feature flow regularization: penalties of weights, and the protocol that all of them follow."""

from __future__ import annotations

from .base import BaseRegularizer, Regularizer

__all__ = ["BaseRegularizer", "Regularizer"]
