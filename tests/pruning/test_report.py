"""What the report says: figures, FLOPs of any model that can be compacted, and plain sentences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruning_models import X, dead
from pruning_nets import Net, linear
from torch import Tensor, nn

from ffr_ext import compact, sparsity
from ffr_ext.pruning.measure import count_flops


def test_the_report_is_data_and_text() -> None:
    report = compact(dead(), torch.randn(X)).report
    text = str(report)
    assert "parameters" in text
    assert f"{report.parameters[1]:,}" in text
    assert "of the parameters are gone" in text
    sets = {s.tensors[0]: s for s in report.sets}
    assert sets["blocks.0.conv1.weight[0]"].removed == 5
    assert sum(sets["blocks.0.conv1.weight[0]"].reasons.values()) == 7
    assert report.channels == (8 + 12 + 12 + 4, 8 + 7 + 7 + 4)


def test_no_gain_is_said_plainly() -> None:
    report = compact(dead(), torch.randn(X), measure=False).report
    report.latency = (1.0e-3, 0.99e-3)
    assert "there is no speed-up" in report.verdict()
    report.latency = (1.0e-3, 0.5e-3)
    assert "0.5 ms against 1 ms" in report.verdict()


def test_a_model_that_keeps_everything_says_where_the_reasons_are() -> None:
    net = Net(
        lambda m, x: m.out(m.norm(m.hidden(x))),
        hidden=linear(4, 6, [1, 2]),
        norm=nn.LayerNorm(6),
        out=linear(6, 2),
    )
    report = compact(net.eval(), torch.randn(2, 4), measure=False).report
    assert "Nothing could be removed" in str(report)
    assert "explain() says why" in str(report)
    assert "6 stay: normalised together by layer_norm in norm" in report.explain()


ROWS = 1 + 5  # the token and the batch


class ClassToken(nn.Module):
    """A module is called with a parameter, as in CaiT and PiT; and where `looks`, with a tensor's value."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4))
        self.hidden, self.out = linear(4, 6, [1, 2]), nn.Linear(6, 3)
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        if self.looks and float(x.sum()) == 0.5:
            raise AssertionError
        return self.out(self.hidden(self.token).relu()) + self.out(self.hidden(x).relu())


@pytest.mark.parametrize("wants_gradient", [False, True], ids=["", "an example that requires grad"])
def test_flops_where_a_module_is_called_with_a_parameter(wants_gradient: bool) -> None:
    model = ClassToken(looks=False).eval()
    x = torch.randn(5, 4, requires_grad=wants_gradient)
    expected = 2 * ROWS * (4 * 6 + 6 * 3)
    assert sparsity(model, example_inputs=x).total.flops == expected
    result = compact(model, x, measure=False)
    assert result.report.flops == (expected, 2 * ROWS * (4 * 4 + 4 * 3))
    assert all(p.requires_grad for p in model.parameters())


def test_flops_of_a_forward_that_looks_at_values() -> None:
    model = ClassToken(looks=True).eval()
    assert count_flops(model, (torch.randn(5, 4),), {}) == 2 * ROWS * (4 * 6 + 6 * 3)


def test_counting_flops_leaves_the_model_as_it_was() -> None:
    class Keeps(nn.Linear):
        kept: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = super().forward(x)
            return self.kept

    model = nn.Sequential(Keeps(4, 3), nn.Dropout()).train()
    sparsity(model, example_inputs=torch.randn(2, 4))
    assert model[0].kept is None
    assert model.training
    assert model[0].weight.requires_grad
