"""Layers that share a weight or a gamma: counted once, zeroed only where every layer agrees."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ffr_ext import sparsity, zero_small_filters


def tied(norms: bool = False) -> nn.Sequential:
    """Three linear layers, the first and the last with one weight, of which two filters are small."""
    layers: list[nn.Module] = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
    layers[2].weight = layers[0].weight
    with torch.no_grad():
        layers[0].weight[1:3] *= 1e-3
    return nn.Sequential(
        *[m for layer in layers for m in ((layer, nn.BatchNorm1d(4)) if norms else (layer,))]
    )


def test_the_filters_of_a_tied_weight_are_zeroed_once() -> None:
    model, x = tied(), torch.randn(2, 4)
    (point,) = zero_small_filters(model, 0.01, dry_run=True)
    assert zero_small_filters(model, 0.01, example_inputs=x, dry_run=True)[0].filters == point.filters
    report = sparsity(model, 0.01)
    assert [row.zero_filters for row in report] == [2, 0, 2]
    zeroed = zero_small_filters(model, 0.01)
    assert [(z.layer, z.filters) for z in zeroed] == [("0", (1, 2))]
    assert sum(map(len, zeroed)) == point.filters == report.zero_filters == 2
    assert (report.filters, report.weights) == (8, 32)
    assert (sparsity(model).zero_filters, sparsity(model).zero_weights) == (2, 8)
    assert model[2].weight is model[0].weight
    assert zero_small_filters(model, 0.01) == []


def test_a_tied_weight_behind_norms_of_their_own_counts_with_each() -> None:
    """Its filters are zeroed with two gammas, which may differ in what is small."""
    model = tied(norms=True)
    with torch.no_grad():
        model[1].weight[:2] = 1e-4
        model[5].weight[1:4] = 1e-4
    (point,) = zero_small_filters(model, 1e-3, dry_run=True)
    report = sparsity(model, 1e-3)
    zeroed = zero_small_filters(model, 1e-3)
    assert [(z.layer, z.norm, z.filters) for z in zeroed] == [("0", "1", (0, 1)), ("4", "5", (1, 2, 3))]
    assert sum(map(len, zeroed)) == point.filters == report.zero_filters == 5
    assert report.filters == 12
    assert zero_small_filters(model, 1e-3) == []


def test_a_filter_of_a_tied_weight_becomes_zero_where_it_is_small_in_every_layer() -> None:
    """One small gamma says nothing of the other layer, which must go on as it was; the channel of the small one is
    gone with its own gamma."""
    model = tied(norms=True).eval()
    with torch.no_grad():
        model[1].weight[:2] = 1e-4
        model[5].weight[1:4] = 1e-4
        weight = model[0].weight.clone()
    zero_small_filters(model, 1e-3)
    assert [bool(row.any()) for row in model[0].weight] == [True, False, True, True]
    assert torch.equal(model[0].weight[[0, 2, 3]], weight[[0, 2, 3]])
    assert model[1].weight.tolist() == [0, 0, 1, 1]
    assert model[5].weight.tolist() == [1, 0, 0, 0]


def test_a_tied_weight_with_and_without_a_norm_keeps_what_either_uses() -> None:
    model = tied()
    model = nn.Sequential(*model, nn.BatchNorm1d(4)).eval()  # behind the last: its gammas are 1
    before = copy.deepcopy(model.state_dict())
    (point,) = zero_small_filters(model, 0.01, dry_run=True)
    assert zero_small_filters(model, 0.01) == []
    assert point.filters == sparsity(model, 0.01).zero_filters == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_gamma_that_layers_share_is_small_where_each_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[3].weight = model[1].weight
    model[1].running_var[0] = 1e-20  # by its own statistics, channel 0 of the first norm is constant
    model[1].running_var[1] = model[3].running_var[1] = 1e-20
    zeroed = zero_small_filters(model, 1e-3)
    assert [(z.layer, z.filters) for z in zeroed] == [("0", (0, 1)), ("2", (1,))]
    assert model[1].weight.tolist() == [1, 0, 1, 1]
    assert [bool(row.any()) for row in model[0].weight] == [False, False, True, True]
    assert [bool(row.any()) for row in model[2].weight] == [True, False, True, True]


def test_a_tied_weight_that_cannot_be_written_changes_nothing() -> None:
    model = nn.Sequential(*tied(), nn.Linear(4, 4))
    prune.random_unstructured(model[3], "weight", 0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"model: 3\.weight is no parameter but computed"):
        zero_small_filters(model, 100.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
