"""Parts of a model that only training mode runs: their inputs stay, or the report says that nothing could be tried."""

from __future__ import annotations

import pytest
import torch
from pruning_nets import conv, norm
from torch import Tensor, nn

from ffr_ext import compact


class Auxiliary(nn.Module):
    """As GoogLeNet and Inception: a second classifier on a feature in the middle, in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = conv(3, 8, dead=[1, 4, 5], padding=1), norm(8, [1, 4, 5])
        self.second = conv(8, 10, dead=[0, 2], padding=1)
        self.third = nn.Conv2d(10, 4, 3)
        self.auxiliary = nn.Sequential(nn.Dropout(), nn.Conv2d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.first(x)).relu()
        y = self.third(self.second(x).relu()).mean((2, 3))
        return (y, self.auxiliary(x).mean((2, 3))) if self.training else y


class Shifted(nn.Module):
    """Adds a parameter in training mode, as models that learn what stands at masked places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(3, 8, dead=[1, 4, 5], padding=1), nn.Conv2d(8, 4, 3)
        self.masked = nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second((x + self.masked if self.training else x).relu())


def test_what_an_auxiliary_classifier_reads_stays() -> None:
    model = Auxiliary()
    x = torch.randn(2, 3, 6, 6)
    result = compact(model, x, measure=False)
    small = result.model
    assert (small.first.out_channels, small.norm.num_features) == (8, 8)
    assert small.second.out_channels == 8
    assert torch.allclose(small.eval()(x), model.eval()(x), atol=1e-6)
    model.train(), small.train()
    torch.manual_seed(0)
    outputs = small(x)
    torch.manual_seed(0)
    for ours, truth in zip(outputs, model(x), strict=True):
        assert torch.allclose(ours, truth, atol=1e-6)
    sum(output.sum() for output in outputs).backward()
    assert "in training mode" in result.report.explain()


def test_a_parameter_that_only_training_reads_keeps_its_channels() -> None:
    result = compact(Shifted(), torch.randn(2, 3, 6, 6), measure=False)
    assert result.model.first.out_channels == 8
    result.model.train()(torch.randn(2, 3, 6, 6)).sum().backward()


@pytest.mark.parametrize("training", [False, True])
def test_trying_training_mode_changes_nothing(training: bool) -> None:
    model, x = Auxiliary().train(training), torch.randn(2, 3, 6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    small = compact(model, x, measure=False).model
    assert torch.equal(torch.rand(1), drawn)  # dropout drew in between
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert int(small.norm.num_batches_tracked) == 0
    assert (model.training, small.training) == (training, training)


def test_a_source_that_cannot_run_in_training_mode_on_the_example_is_said() -> None:
    class OneValue(Auxiliary):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            y = super().forward(x)
            return (self.late(y[0]), y[1]) if isinstance(y, tuple) else self.late(y)

    report = compact(OneValue().eval(), torch.randn(1, 3, 6, 6), measure=False).report
    assert "auxiliary.1.weight, auxiliary.1.bias take no part in eval mode" in str(report)
    assert "Expected more than 1 value per channel" in str(report)


def test_synchronised_norms_wait_for_nobody() -> None:
    """In training mode they talk to the other ranks, which may be trying something else; on the CPU they refuse."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Auxiliary()).eval()
    result = compact(model, torch.randn(2, 3, 6, 6), measure=False)
    assert (result.model.first.out_channels, result.model.second.out_channels) == (8, 8)
    assert not any("could not be tried" in note for note in result.report.notes)


def test_a_model_that_training_runs_as_eval_does_is_not_run_in_training_mode() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(3, 8, dead=[1, 4, 5]), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return self.second(self.first(x).relu())

    result = compact(Fails().eval(), torch.randn(2, 3, 6, 6), measure=False)
    assert result.model.first.out_channels == 5
    assert result.report.notes == []
