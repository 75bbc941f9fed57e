"""Experts that are modules: the dead hidden units of each expert leave exactly, and the experts stay."""

from __future__ import annotations

import pytest
import torch
from expert_nets import KINDS, WIDTH, Mixture, mixture, same_outputs
from torch import nn

from ffr_ext import compact
from ffr_ext.pruning import prune_to


@pytest.mark.parametrize("kind", KINDS)
def test_dead_hidden_units_of_every_expert_leave(kind: str) -> None:
    model = mixture(kind)
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert [e.up.out_features for e in result.model[1].experts] == [8, 7, 6, 5], result.report.explain()
    assert [e.down.in_features for e in result.model[1].experts] == [8, 7, 6, 5]
    same_outputs(result.model, model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_that_chosen_experts_stay(kind: str) -> None:
    report = compact(mixture(kind), torch.randn(2, 7, WIDTH), measure=False).report
    lines = [note for note in report.notes if "experts" in note]
    said = "1.experts: all experts stay, because which tokens an expert gets depends on values; their dead hidden"
    assert (len(lines) == 1 and lines[0].startswith(said)) == kind.startswith("routed")
    assert any("at least one" in note for note in report.notes) == (kind == "routed_unless_empty")


def test_a_channel_of_the_stream_leaves_with_all_experts() -> None:
    """Nothing in front of, in, or behind the mixture makes or reads it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Mixture("routed_in_place"), nn.Linear(WIDTH, 3)).eval()
    with torch.no_grad():
        model[0].weight[:2] = model[0].bias[:2] = 0
        for expert in model[1].experts:
            expert.down.weight[:2] = expert.down.bias[:2] = 0
    # The forward names the width in a reshape, which the search finds out.
    result = compact(model, torch.randn(2, 7, WIDTH), measure=False)
    assert {e.up.in_features for e in result.model[1].experts} == {WIDTH}
    assert any("stay: without their dead channels the forward code fails" in n for n in result.report.notes)
    same_outputs(result.model, model)


def test_a_budget_of_parameters_is_met_and_one_of_flops_refused_where_values_decide() -> None:
    x = torch.randn(2, 7, WIDTH)
    small = prune_to(mixture("routed_in_place"), x, parameters=0.7)
    assert small.report.parameters[1] <= 0.7 * small.report.parameters[0]
    with pytest.raises(
        ValueError, match=r"flops: 1\.experts take as many tokens as values send them.*parameters="
    ):
        prune_to(mixture("routed_in_place"), x, flops=0.7)
    small = prune_to(mixture("all_masked"), x, flops=0.7)
    assert small.report.flops[1] <= 0.7 * small.report.flops[0]
