"""`compact(strict=...)`: constants that no bias can take up exactly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pruning_models import X, difference
from pruning_nets import constant_behind_padding
from torch import Tensor, nn

from ffr_ext import compact


def test_strict_keeps_what_is_not_exact_and_says_so() -> None:
    model = constant_behind_padding()
    result = compact(model, torch.randn(X), measure=False)
    assert result.model[0].out_channels == 6, "one constant carries the other two"
    assert result.report.max_error < 1e-6
    assert "zero-padded border" in result.report.explain()
    assert "conv2d in 2" in result.report.explain()


def test_not_strict_folds_the_interior_and_reports_the_error() -> None:
    model = constant_behind_padding()
    result = compact(model, torch.randn(X), strict=False, measure=False)
    assert result.model[0].out_channels == 5
    x = torch.randn(X)
    with torch.no_grad():
        change = (model(x) - result.model(x)).abs()
    assert change[..., 1:-1, 1:-1].max() < 1e-6
    assert result.report.max_error > 1e-3
    assert result.report.max_error == pytest.approx(float(change.max()), rel=1e-3)


def test_not_strict_keeps_what_the_forward_code_needs() -> None:
    """A channel that only an inexact cut would remove, and a forward that fails without it."""

    class FixedSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = constant_behind_padding()

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[:2](x)
            return self.layers[2](x.view(-1, 8, *x.shape[2:]))

    model = FixedSize().eval()
    result = compact(model, torch.randn(X), strict=False, measure=False)
    assert result.model.layers[0].out_channels == 8
    assert difference(model, result.model) == 0
    assert any("without their dead channels the forward code fails" in note for note in result.report.notes)


def test_not_strict_with_a_weight_that_is_computed_in_the_forward() -> None:
    """The two analyses do not number the channels of such a weight alike."""

    class Standardized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias, padding=1)

    model = nn.Sequential(constant_behind_padding(), Standardized(4, 4, 3), nn.Conv2d(4, 2, 1)).eval()
    strict, folded = (compact(model, torch.randn(X), strict=s, measure=False) for s in (True, False))
    assert strict.model[0][0].out_channels == 6
    assert folded.model[0][0].out_channels == 5
    assert strict.report.max_error < 1e-5 < folded.report.max_error


@pytest.mark.parametrize("name", ["resnet-basic", "regnet", "mobilenet-v2"])
def test_not_strict_leaves_no_more_than_strict_and_measures_its_error(name: str) -> None:
    pytest.importorskip("transformers")
    from pruning_zoo import ZOO, kill, largest_difference, randomize

    make, inputs = ZOO[name]
    model, x = kill(randomize(make())), inputs()
    strict, folded = (compact(model, x, strict=s, measure=False) for s in (True, False))
    assert folded.report.channels[1] <= strict.report.channels[1]
    assert strict.report.max_error < 1e-5
    assert folded.report.max_error >= largest_difference(model, folded.model, x) > 1e-5
