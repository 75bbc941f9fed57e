"""What FeatureFlow captures from a compiled call is summed in its graph: no feature leaves it but the last two.

Counted in the code that Inductor generates, which lays features out in channels_last whatever was traced.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_models import gradients
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from ffr_ext import FeatureFlow, ffr_loss

SHAPE = (4, 16, 12, 12)


class Blocks(nn.Module):
    """Residual blocks; the outputs of all are features, which convolutions read. Some are called twice."""

    def __init__(self, blocks: int = 5, again: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.again = again
        self.head = nn.Conv2d(16, 16, 3)

    def features(self, x: Tensor) -> list[Tensor]:
        features = []
        for index in [*range(len(self.blocks)), *self.again]:
            x = self.blocks[index](x)
            features.append(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1]).mean()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)).relu()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _generated(run: Callable[[], Any]) -> list[str]:
    """The code of the forward and of the backward graph."""
    with config.patch(fx_graph_cache=False):
        _, codes = run_and_get_code(run)
    assert len(codes) == 2
    return codes


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="without oneDNN convolutions stay contiguous"
)
def test_the_last_two_features_alone_leave_the_graph_and_nothing_is_transposed() -> None:
    model, x, made = Blocks(), torch.randn(SHAPE), []
    with FeatureFlow(model, list(model.blocks)) as flow:
        expected = gradients(model, model(x) + flow.loss())
        compiled = torch.compile(model, fullgraph=True)
        codes = _generated(lambda: made.extend(gradients(model, compiled(x) + flow.loss())))
        compiled(x)
        filled = [f.untyped_storage().nbytes() > 4 for f in flow._recorder.features]
    assert filled == [False, False, False, True, True]
    for got, wanted in zip(made, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    contiguous = re.escape(f"empty_strided_cpu({SHAPE}, (2304, 144, 12, 1), torch.float32)")
    assert [len(re.findall(contiguous, code)) for code in codes] == [0, 0]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": "l2"},
    {"norm": "l2_squared", "reduction": "sum", "curvature": 0.0},
    {"norm": "l2_squared", "curvature_kind": "angle"},
    {"curvature_kind": "angle"},
    {"gradient": [1.0, 2.0, 3.0, 4.0]},
    {"backend": "cpu"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_setting_has_the_eager_numbers(options: dict[str, Any], fused: str) -> None:
    model, x = Blocks(), torch.randn(SHAPE)
    with FeatureFlow(model, list(model.blocks), **options) as flow:
        output = model(x)
        terms, loss = flow.terms(), flow.loss()
        expected = gradients(model, output + loss)
        output = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        for before in flow.terms(), terms:
            torch.testing.assert_close(before, terms)
        traced = flow.loss()
        torch.testing.assert_close(traced, loss)
        for got, wanted in zip(gradients(model, output + traced), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flow.terms(), terms)


def test_layers_called_again_after_the_last_go_on_with_the_path() -> None:
    model, x = Blocks(3, again=(0, 2)), torch.randn(SHAPE)
    expected = ffr_loss(model.features(x))
    with FeatureFlow(model, list(model.blocks)) as flow:
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(flow.loss(), expected)


def test_features_of_other_shapes_begin_a_stage() -> None:
    layers = [
        nn.Linear(4, 4),
        nn.Linear(4, 6),
        nn.Linear(6, 6),
        nn.Linear(6, 4),
        nn.Linear(4, 6),
        nn.Linear(6, 6),
    ]
    model, x = nn.Sequential(*layers, nn.Linear(6, 6), nn.Linear(6, 1)), torch.randn(3, 4)
    with FeatureFlow(model, [*layers[1:], model[6]]) as flow:
        expected = gradients(model, model(x).sum() + flow.loss())
        loss = torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum() + flow.loss()
        for got, wanted in zip(gradients(model, loss), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_one_graph_serves_all_batch_sizes() -> None:
    model = Blocks(4)
    with FeatureFlow(model, list(model.blocks)) as flow:
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        graphs = []
        for batch in (4, 2, 3, 7):
            x = torch.randn(batch, *SHAPE[1:])
            expected = gradients(model, model(x) + flow.loss())
            for got, wanted in zip(gradients(model, compiled(x) + flow.loss()), expected, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert graphs == graphs[:1] * 4


def test_a_feature_overwritten_after_it_was_summed_is_an_error() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            first = self.layers[0](x)
            second = self.layers[1](first + 1)
            first.mul_(2)
            return self.layers[3](self.layers[2](second + first)).sum()

    model = Overwrites()

    def step() -> None:
        with FeatureFlow(model, list(model.layers)) as flow:
            torch.compile(model, backend="aot_eager")(torch.randn(3, 4))
            flow.loss()

    with pytest.raises(RuntimeError, match=r"overwritten in place|by an inplace operation"):
        step()
