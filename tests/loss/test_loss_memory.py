"""No difference tensor exists: what forward and backward allocate, counted."""

from __future__ import annotations

import pytest
import torch
from helpers import random_features
from memory import allocations
from torch import Tensor

from ffr_ext import ffr_loss

# Small tensors beside the signs and the gradients: stats, weights, the loss, a row of partial sums for each unit
# of work.
SMALL = 16 * 1024


def _features(length: int = 6, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return random_features(*[(8, 16, 32, 32)] * length, *[(8, 32, 16, 16)] * length, dtype=dtype)


def _nbytes(features: list[Tensor]) -> int:
    return sum(f.numel() * f.element_size() for f in features)


@pytest.mark.parametrize("length", [2, 3, 6, 19])
def test_forward_of_l1_allocates_at_most_an_eighth_of_the_features(length: int, fused: str) -> None:
    """4 bits an element: 1/8 of float32. One sign plane fewer than there are features pays for the small tensors."""
    features = _features(length)
    ffr_loss(features, backend=fused)  # weights are made once
    made = allocations(lambda: ffr_loss(features, backend=fused))
    assert made.allocated <= _nbytes(features) / 8


@pytest.mark.parametrize("norm", ["l2_squared", "l2"])
def test_forward_of_the_other_norms_allocates_next_to_nothing(norm: str, fused: str) -> None:
    features = _features()
    ffr_loss(features, norm=norm, backend=fused)
    assert allocations(lambda: ffr_loss(features, norm=norm, backend=fused)).allocated <= SMALL


def test_forward_without_a_gradient_saves_no_signs(fused: str) -> None:
    features = [f.detach() for f in _features()]
    ffr_loss(features, backend=fused)
    assert allocations(lambda: ffr_loss(features, backend=fused)).allocated <= SMALL


@pytest.mark.parametrize("norm", ["l1", "l2_squared", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_backward_allocates_the_gradients_and_nothing_else(
    norm: str, dtype: torch.dtype, layout: torch.memory_format, fused: str
) -> None:
    features = [f.detach().contiguous(memory_format=layout).requires_grad_() for f in _features(dtype=dtype)]
    loss = ffr_loss(features, norm=norm, backend=fused)
    made = allocations(lambda: torch.autograd.grad(loss, features))
    assert _nbytes(features) <= made.allocated <= _nbytes(features) + SMALL


def test_a_feature_that_wants_no_gradient_gets_no_memory(fused: str) -> None:
    features = _features()
    for f in features[::2]:
        f.requires_grad_(False)
    wanted = features[1::2]
    loss = ffr_loss(features, backend=fused)
    made = allocations(lambda: torch.autograd.grad(loss, wanted))
    assert made.allocated <= _nbytes(wanted) + SMALL
