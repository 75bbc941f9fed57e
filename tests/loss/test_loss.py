"""Every backend against the reference in float64: values and gradients over dtypes, norms, shapes, layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from helpers import (
    assert_no_worse_than_torch,
    features_with_ties,
    loss_and_grads,
    map_features,
    random_features,
    reference_in,
)
from torch import Tensor

from ffr_ext import ffr_loss, flow_terms

NORMS = ["l1", "l2_squared", "l2"]
KINDS = ["difference", "angle"]
REDUCTIONS = ["mean", "batchmean", "sum"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Each shape with what it is for.
SHAPES = {
    "image": (2, 3, 5, 7),  # 210 elements: no multiple of a vector or of a sign block
    "aligned": (4, 16, 8, 8),  # whole vectors, whole sign blocks
    "one element": (1, 1),
    "odd": (3, 11),  # samples of odd length: a group boundary inside a vector
    "rank 1": (33,),  # one more than a sign block of 32
    "rank 5": (2, 3, 2, 5, 3),
    "several chunks": (2, 50021),  # samples longer than one unit of work, of prime length
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_value_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, norm: str, fused: str) -> None:
    features = random_features(*[shape] * 4, dtype=dtype)
    assert_no_worse_than_torch(features, upstream=-1.7, gradient=0.3, curvature=1.9, norm=norm, backend=fused)


@pytest.mark.parametrize(
    ("norm", "kind", "reduction", "transition"),
    list(itertools.product(NORMS, KINDS, REDUCTIONS, ["break", "pool"])),
)
def test_every_combination_of_options(
    norm: str, kind: str, reduction: str, transition: str, fused: str
) -> None:
    features = random_features(*[(3, 4, 6, 6)] * 3, *[(3, 5, 3, 3)] * 1, *[(3, 5, 1, 1)] * 3)
    options = dict(norm=norm, curvature_kind=kind, reduction=reduction, transition=transition)
    assert_no_worse_than_torch(features, upstream=2.5, gradient=0.7, curvature=1.3, backend=fused, **options)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 70])
@pytest.mark.parametrize("norm", NORMS)
def test_stages_of_every_length(length: int, norm: str, fused: str) -> None:
    """70 features: longer than any kernel holds at once."""
    assert_no_worse_than_torch(random_features(*[(2, 37)] * length), norm=norm, backend=fused)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_uneven_parts_of_a_batch_weighted_as_the_guide_says_are_the_whole(norm: str, reduction: str) -> None:
    options = {"norm": norm, "reduction": reduction, "backend": "reference"}
    features, parts = random_features(*[(8, 3, 4)] * 4, dtype=torch.float64), ((0, 7), (7, 8))
    weights = [(b - a) * len(parts) / 8 if reduction != "sum" else len(parts) for a, b in parts]
    losses = [ffr_loss([f[a:b] for f in features], **options) for a, b in parts]
    mean_over_processes = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / len(parts)
    torch.testing.assert_close(mean_over_processes, ffr_loss(features, **options))


def test_many_stages_and_features_outside_any_term(fused: str) -> None:
    features = random_features((2, 3), (2, 5), (2, 5), (4, 4), (2, 5), (2, 5), (2, 5), (7,))
    assert_no_worse_than_torch(features, backend=fused)
    grads = loss_and_grads(features, backend=fused).grads
    for alone in (0, 3, 7):
        assert grads[alone] is None or not grads[alone].any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_follow_torch(norm: str, dtype: torch.dtype, fused: str) -> None:
    """After a ReLU most differences are exactly 0: sign(0) = 0, and the Euclidean norm's gradient at 0 is 0."""
    features = features_with_ties(*[(4, 6, 5)] * 4, dtype=dtype)
    assert_no_worse_than_torch(features, norm=norm, backend=fused)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_identical_features_give_zero_and_zero_gradients(norm: str, kind: str, backend: str) -> None:
    x = torch.randn(2, 9)
    result = loss_and_grads(
        [x.clone().requires_grad_() for _ in range(4)], norm=norm, curvature_kind=kind, backend=backend
    )
    assert result.loss.item() == 0.0
    for grad in result.grads:
        assert torch.equal(grad, torch.zeros_like(x))


def _every_second(x: Tensor) -> Tensor:
    wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


def _offset(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # dense, batch not outermost
    "permuted": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "every second": _every_second,  # not dense
    "offset view": _offset,  # dense but not aligned to 16 bytes
    "expanded": lambda x: x[:, :1].expand(x.shape),  # overlapping
    "flipped channels stride 0 of size 1": lambda x: x[:1].expand(x.shape[0], -1, -1, -1),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, norm: str, fused: str) -> None:
    features = map_features(random_features(*[(3, 4, 5, 6)] * 4, dtype=dtype), LAYOUTS[layout])
    assert_no_worse_than_torch(features, norm=norm, backend=fused)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mixed", list(itertools.permutations(LAYOUTS, 2))[::5], ids=" + ".join)
def test_mixed_layouts_in_one_stage(mixed: tuple[str, str], norm: str, fused: str) -> None:
    """The same storage position means different elements there: pairing them in storage order would be wrong
    silently.
    """
    plain = random_features(*[(3, 4, 5, 6)] * 4)
    features = [map_features([x], LAYOUTS[mixed[i % 2]])[0] for i, x in enumerate(plain)]
    assert_no_worse_than_torch(features, norm=norm, backend=fused)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "permuted"])
@pytest.mark.parametrize("norm", NORMS)
def test_each_gradient_has_the_strides_of_its_feature(layout: str, norm: str, fused: str) -> None:
    features = map_features(random_features(*[(3, 4, 5, 6)] * 3), LAYOUTS[layout])
    grads = torch.autograd.grad(ffr_loss(features, norm=norm, backend=fused), features)
    for feature, grad in zip(features, grads, strict=True):
        assert grad.stride() == feature.stride()


def test_gradients_keep_their_strides_when_the_layouts_of_a_stage_differ(fused: str) -> None:
    plain = random_features(*[(3, 4, 5, 6)] * 2)
    features = [plain[0], *map_features(plain[1:], LAYOUTS["channels_last"])]
    grads = torch.autograd.grad(ffr_loss(features, backend=fused), features)
    assert [g.stride() for g in grads] == [f.stride() for f in features]


@pytest.mark.parametrize("norm", NORMS)
def test_mixed_dtypes_in_one_stage_are_promoted(norm: str, fused: str) -> None:
    features = [
        x.detach().to(dtype).requires_grad_()
        for x, dtype in zip(random_features(*[(3, 8)] * 4, dtype=torch.float64), DTYPES, strict=True)
    ]
    truth = reference_in(torch.float64, features, norm=norm)
    ours = loss_and_grads(features, norm=norm, backend=fused)
    assert ours.loss.dtype == torch.float64
    assert ours.loss.item() == pytest.approx(truth.loss.item(), rel=1e-12)
    for feature, grad, expected in zip(features, ours.grads, truth.grads, strict=True):
        assert grad.dtype == feature.dtype
        assert torch.allclose(grad.double(), expected, rtol=torch.finfo(feature.dtype).eps, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", NORMS)
def test_dtype_of_the_loss(dtype: torch.dtype, expected: torch.dtype, norm: str, backend: str) -> None:
    features = random_features((2, 4), (2, 4), (2, 4), dtype=dtype)
    assert ffr_loss(features, norm=norm, backend=backend).dtype == expected
    assert ffr_loss(features, norm=norm, backend=backend).shape == ()
    terms = flow_terms(features, norm=norm, backend=backend)
    assert terms.gradient.dtype == terms.curvature.dtype == expected


def test_large_half_precision_features_do_not_overflow(fused: str) -> None:
    """Differences of 1.2e5 do not exist in float16, nor do their squares."""
    x = torch.full((4, 100), 6e4, dtype=torch.float16)
    for norm in NORMS:
        loss = ffr_loss([x, -x, x], norm=norm, backend=fused)
        assert torch.isfinite(loss), norm


@pytest.mark.parametrize("norm", NORMS)
def test_sums_of_many_equal_elements_keep_their_digits(norm: str, fused: str) -> None:
    """2^24 equal float32 addends: a single running sum in float32 stops growing there."""
    x = torch.zeros(1, 1 << 24)
    loss = ffr_loss([x, x + 0.1], norm=norm, reduction="mean", backend=fused)
    expected = 0.1**2 if norm == "l2_squared" else 0.1
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_nan_and_inf_reach_the_loss_and_gradients_follow_torch(norm: str, fused: str) -> None:
    features = random_features(*[(2, 40)] * 3)
    with torch.no_grad():
        features[1][0, 3] = float("inf")
        features[2][1, 7] = float("nan")
    ours, eager = (loss_and_grads(features, norm=norm, backend=b) for b in (fused, "reference"))
    assert not torch.isfinite(ours.loss)
    for a, b in zip(ours.grads, eager.grads, strict=True):
        assert torch.allclose(a, b, equal_nan=True, rtol=1e-5, atol=1e-7)
