"""In a compiled convolutional network the penalty transposes no feature and no gradient, and keeps no second copy.

Counted in the code that Inductor generates: it lays features out in channels_last whatever was traced.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from ffr_ext import FeatureFlow, ffr_loss

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="without oneDNN convolutions stay contiguous"
)

SHAPE = (4, 16, 12, 12)
CONTIGUOUS = re.escape(f"empty_strided_cpu({SHAPE}, (2304, 144, 12, 1), torch.float32)")


class Blocks(nn.Module):
    """Four residual blocks; the outputs of all are features, which convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Conv2d(16, 16, 3)  # a feature that no convolution reads stays contiguous

    def forward(self, x: Tensor, features: list[Tensor] | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if features is not None:
                features.append(x)
        return self.head(x).mean()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).relu()


def _with_loss(norm: str) -> tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    model = Blocks()

    def loss(x: Tensor) -> Tensor:
        features: list[Tensor] = []
        return model(x, features) + ffr_loss(features, norm=norm, backend="cpu")

    return model, loss, torch.compile(loss, fullgraph=True)


def _generated(run: Callable[[], None]) -> list[str]:
    """The code of the forward and of the backward graph."""
    torch.compiler.reset()
    with config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(run)
    assert len(codes) == 2
    return codes


def _transpositions_of_features(code: str) -> int:
    """Buffers of a feature's size that are contiguous: each is a transposed copy."""
    return len(re.findall(CONTIGUOUS, code))


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_ffr_loss_copies_no_feature_and_saves_signs_alone(norm: str, fused: str) -> None:
    model, eager, compiled = _with_loss(norm)
    x, made = torch.randn(SHAPE), []
    codes = _generated(lambda: made.extend(_gradients(model, compiled(x))))
    for got, expected in zip(made, _gradients(model, eager(x)), strict=True):
        torch.testing.assert_close(got, expected)
    assert [_transpositions_of_features(code) for code in codes] == [0, 0]
    assert sum(code.count("ffr_ext.flow_gradients.default(") for code in codes) == 1


def test_feature_flow_lets_features_leave_the_graph_as_they_lie(fused: str) -> None:
    model, x, made = Blocks(), torch.randn(SHAPE), []
    with FeatureFlow(model, list(model.blocks), backend="cpu") as flow:
        expected = _gradients(model, model(x) + flow.loss())
        compiled = torch.compile(model, fullgraph=True)
        codes = _generated(lambda: made.extend(_gradients(model, compiled(x) + flow.loss())))
    for got, wanted in zip(made, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert [_transpositions_of_features(code) for code in codes] == [0, 0]


@pytest.mark.parametrize("norm", ["l1", "l2_squared"])
def test_a_wrong_guess_about_the_layout_costs_a_copy_and_no_number(norm: str, fused: str) -> None:
    """Nothing here is a convolution, so that Inductor leaves images contiguous."""
    inputs = [torch.randn(3, 4, 5, 6, requires_grad=True) for _ in range(4)]

    def loss(features: list[Tensor]) -> Tensor:
        return ffr_loss([f * 2 for f in features], norm=norm, backend="cpu")

    made = torch.autograd.grad(torch.compile(loss, fullgraph=True)(inputs), inputs)
    for got, expected, feature in zip(made, torch.autograd.grad(loss(inputs), inputs), inputs, strict=True):
        torch.testing.assert_close(got, expected)
        assert got.stride() == feature.stride()
