"""In a graph that is traced for a CPU, backend="auto" is plain operations with a backward pass of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_features
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ffr_ext import ffr_loss, flow_terms


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def _loss(features: list[Tensor], **options: Any) -> Tensor:
    return ffr_loss([feature * 1 for feature in features], **options)


OPTIONS: list[dict[str, Any]] = [
    {"norm": norm, "curvature_kind": kind}
    for norm in ("l1", "l2", "l2_squared")
    for kind in ("difference", "angle")
]
OPTIONS += [{"transition": "pool", "norm": norm} for norm in ("l1", "l2")]
OPTIONS += [{"gradient": 0.0}, {"curvature": [1.0, 2.0, 0.5]}, {"reduction": "sum"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_and_gradients_are_those_of_the_formula(options: dict[str, Any]) -> None:
    features = random_features(*[(3, 4, 4, 4)] * 4, *[(3, 8, 2, 2)] * 3)
    if options.get("transition") == "pool":
        features = features[:5]
    truth = _loss(features, **options, backend="reference")
    traced = torch.compile(_loss, fullgraph=True, backend="aot_eager")(features, **options)
    torch.testing.assert_close(traced, truth)
    expected = torch.autograd.grad(truth, features)
    for got, wanted in zip(torch.autograd.grad(traced, features), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", ["l1", "l2_squared"])
def test_low_precision_is_summed_in_float32(norm: str, dtype: torch.dtype) -> None:
    features = [f.detach().to(dtype).requires_grad_() for f in random_features(*[(16, 8, 20, 20)] * 3)]
    truth = ffr_loss([f.double() for f in features], norm=norm, backend="reference")
    traced = torch.compile(_loss, fullgraph=True)(features, norm=norm)
    assert traced.dtype == torch.float32
    torch.testing.assert_close(traced.double(), truth, rtol=3e-6, atol=0)
    expected = torch.autograd.grad(truth, features)
    for got, wanted in zip(torch.autograd.grad(traced, features), expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted)


def test_ties_are_those_of_the_kernels(fused: str) -> None:
    features = [torch.randint(0, 3, (5, 7)).float().requires_grad_() for _ in range(5)]
    traced = torch.autograd.grad(torch.compile(_loss, fullgraph=True)(features), features)
    for got, wanted in zip(
        traced, torch.autograd.grad(_loss(features, backend=fused), features), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("norm", ["l1", "l2", "l2_squared"])
def test_masked_positions_get_no_gradient_whatever_is_there(norm: str) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    features = [
        f.detach().masked_fill(~mask[..., None], float("nan")) for f in random_features(*[(2, 3, 4)] * 4)
    ]
    features = [f.requires_grad_() for f in features]
    truth = _loss(features, norm=norm, mask=mask)
    traced = torch.compile(_loss, fullgraph=True, backend="aot_eager")(features, norm=norm, mask=mask)
    torch.testing.assert_close(traced, truth)
    expected = torch.autograd.grad(truth, features)
    for got, wanted in zip(torch.autograd.grad(traced, features), expected, strict=True):
        torch.testing.assert_close(got, wanted)
        assert not got[~mask].any()


def test_only_wanted_gradients_and_terms_one_by_one() -> None:
    features = random_features(*[(3, 4)] * 4)
    features[1].requires_grad_(False)
    wanted = [f for f in features if f.requires_grad]
    truth, traced = (run(features) for run in (flow_terms, torch.compile(flow_terms, backend="aot_eager")))
    for a, b in zip(traced, truth, strict=True):
        torch.testing.assert_close(a, b)
    upstream = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    pairs = [torch.autograd.grad(terms.gradient, wanted, upstream) for terms in (traced, truth)]
    for got, expected in zip(*pairs, strict=True):
        torch.testing.assert_close(got, expected)


def test_empty_features_have_the_loss_zero() -> None:
    features = [torch.zeros(0, 4, requires_grad=True) for _ in range(3)]
    traced = torch.compile(_loss, fullgraph=True, backend="aot_eager")(features)
    assert traced == 0
    assert [g.shape for g in torch.autograd.grad(traced, features)] == [(0, 4)] * 3


def test_one_graph_serves_all_sizes() -> None:
    counter = CompileCounter()
    compiled = torch.compile(_loss, backend=counter, dynamic=True, fullgraph=True)
    for batch in range(2, 12):
        for size in (4, 6):
            features = random_features(*[(batch, 3, size, size)] * 3)
            torch.testing.assert_close(compiled(features), _loss(features))
    assert counter.frame_count <= 2
