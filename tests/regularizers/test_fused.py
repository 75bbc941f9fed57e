"""`row_column_norms`, `add_scaled_` and `shrink_`: every backend against the formula in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffr_ext.regularizers.fused import add_scaled_, row_column_norms, shrink_

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    made = [
        torch.randn(6, 40, 3, 3),  # long runs
        channels_last(torch.randn(7, 5, 3, 3)),
        channels_last(torch.randn(5, 300, 1, 1)),
        torch.randn(9, 130),
        torch.randn(130, 9).t(),  # columns lie outside, rows inside
        torch.randn(3, 4, 5, 2).permute(2, 1, 3, 0),
        torch.randn(33, 1, 3, 3),  # depthwise: one column
        torch.randn(1, 33, 3),
        torch.randn(1, 1),
        torch.randn(70, 3),  # short runs
        torch.randn(257),
        torch.randn(0, 3),
        torch.randn(3, 0, 2),
        torch.randn(10, 9, 1, 1)[::2],  # gaps
    ]
    return [w.to(dtype) for w in made]


def factors(weights: list[Tensor], dim: int, kind: torch.dtype = torch.float32) -> list[Tensor | None]:
    """For every tensor, but for one in three none."""
    return [
        torch.randn(w.shape[dim], dtype=kind) if w.dim() > dim and (i + dim) % 3 else None
        for i, w in enumerate(weights)
    ]


def over(factors: Tensor | None, weight: Tensor, dim: int, without: float) -> Tensor:
    """The factors of a dimension in float64, in a shape that goes with the weight's."""
    if factors is None:
        return torch.full((), without, dtype=torch.float64)
    return factors.double().view(-1, *[1] * (weight.dim() - 1 - dim))


def assert_rounded(got: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """One rounding to the dtype, and the compute precision's on each of a few operations."""
    compute = torch.float64 if got.dtype == torch.float64 else torch.float32
    finfo = torch.finfo(got.dtype)
    allowed = finfo.eps / 2 * truth.abs() + 4 * torch.finfo(compute).eps * magnitude
    allowed += finfo.smallest_normal * finfo.eps
    assert ((got.double() - truth).abs() <= allowed).all()


# ------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_rows_and_columns_equal_vector_norm(backend: str, p: float, dtype: torch.dtype) -> None:
    listed = weights(dtype)
    for w, (rows, columns) in zip(listed, row_column_norms(listed, p, backend=backend), strict=True):
        for dim, norms in enumerate((rows, columns)):
            if dim == w.dim():
                assert norms is None
                continue
            assert norms is not None
            slices = (
                (w.double() if dim == 0 else w.double().transpose(0, 1)).flatten(1)
                if w.dim() > 1
                else w.double()[:, None]
            )
            truth = (
                torch.linalg.vector_norm(slices, p, dim=1) if w.numel() else slices.new_zeros(w.shape[dim])
            )
            torch.testing.assert_close(
                norms, truth.to(torch.float64 if dtype == torch.float64 else torch.float32)
            )


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_a_nan_shows_in_its_row_and_its_column_alone(backend: str, p: float) -> None:
    for weight in (torch.randn(5, 50, 3, 3), channels_last(torch.randn(5, 50, 3, 3)), torch.randn(5, 1, 3)):
        weight[3, weight.shape[1] // 2, -1] = math.nan
        ((rows, columns),) = row_column_norms([weight], p, backend=backend)
        assert columns is not None
        assert rows.isnan().nonzero().flatten().tolist() == [3]
        assert columns.isnan().nonzero().flatten().tolist() == [weight.shape[1] // 2]


def test_norms_of_a_layer_in_many_strips_and_chunks(backend: str) -> None:
    for weight in (torch.randn(20, 20_000), torch.randn(40, 1_000, 3, 3), torch.randn(9_000, 40).t()):
        ((rows, columns),) = row_column_norms([weight], backend=backend)
        assert columns is not None
        torch.testing.assert_close(rows, weight.double().flatten(1).norm(dim=1).float())
        torch.testing.assert_close(columns, weight.double().transpose(0, 1).flatten(1).norm(dim=1).float())


# ------------------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slope", [0.0, -0.7])
def test_add_scaled_is_its_formula(backend: str, dtype: torch.dtype, slope: float) -> None:
    listed = weights(dtype)
    rows, columns = factors(listed, 0), factors(listed, 1)
    grads = [torch.randn(w.shape).to(dtype).as_strided(w.shape, w.stride()) if w.is_contiguous()
             else torch.empty_like(w).copy_(torch.randn(w.shape)) for w in listed]  # fmt: skip
    before = [g.clone() for g in grads]
    add_scaled_(grads, listed, rows, columns, slope, 0.5, backend=backend)
    for w, g, old, r, q in zip(listed, grads, before, rows, columns, strict=True):
        x = w.double()
        parts = over(r, w, 0, 0.0), over(q, w, 1, 0.0), slope * (x.abs() <= 0.5).double()
        assert_rounded(
            g,
            old.double() + x * (parts[0] + parts[1] + parts[2]),
            old.double().abs() + x.abs() * sum(p.abs() for p in parts),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shrink_is_its_formula(backend: str, dtype: torch.dtype) -> None:
    listed = weights(dtype)
    rows, columns = factors(listed, 0), factors(listed, 1)
    before = [w.clone() for w in listed]
    shrink_(listed, rows, columns, 0.25, backend=backend)
    for w, old, r, q in zip(listed, before, rows, columns, strict=True):
        truth = old.double() * over(r, w, 0, 1.0) * over(q, w, 1, 1.0)
        sure = (truth.abs() - 0.25).abs() > 1e-5  # else rounding decides
        assert torch.equal((w == 0) & sure, (truth.abs() <= 0.25) & sure)
        kept = sure & (truth.abs() > 0.25)
        assert_rounded(w[kept], truth[kept], truth[kept].abs())


def test_slope_and_tau_may_differ_from_tensor_to_tensor(backend: str) -> None:
    w = torch.tensor([[0.1, 0.5, 2.0]])
    both, grads = [w.clone(), w.clone()], [torch.zeros_like(w), torch.zeros_like(w)]
    add_scaled_(grads, both, slope=[1.0, 10.0], tau=[0.2, 1.0], backend=backend)
    torch.testing.assert_close(grads[0], torch.tensor([[0.1, 0.0, 0.0]]))
    torch.testing.assert_close(grads[1], torch.tensor([[1.0, 5.0, 0.0]]))
    shrink_(both, tau=[0.2, 1.0], backend=backend)
    assert both[0].tolist() == torch.tensor([[0.0, 0.5, 2.0]]).tolist()
    assert both[1].tolist() == [[0.0, 0.0, 2.0]]


def test_a_nan_weight_stays_visible_and_disturbs_no_other(backend: str) -> None:
    w = torch.ones(2, 40)
    w[1, 3] = math.nan
    grad = torch.zeros_like(w)
    add_scaled_([grad], [w], [torch.tensor([0.0, 0.0])], slope=1.0, tau=0.5, backend=backend)
    assert grad.isnan().nonzero().tolist() == [[1, 3]]
    shrink_([w], [torch.zeros(2)], tau=9.0, backend=backend)
    assert w.isnan().nonzero().tolist() == [[1, 3]]
    assert w.nansum() == 0


def test_shrink_without_a_threshold_leaves_no_negative_zero(backend: str) -> None:
    w = torch.tensor([[-0.0, -1.0, 1e-45, 0.0]])
    shrink_([w], [torch.tensor([1.0])], backend=backend)
    assert torch.equal(w, torch.tensor([[0.0, -1.0, 1e-45, 0.0]]))
    assert not w.signbit()[0, 0]


def test_half_types_are_computed_in_float32_and_rounded_once(backend: str) -> None:
    """4096 + 1 + 1 is 4096 in float16, which has no 4097, unless the two ones are added first."""
    w, grad = torch.ones(1, 1, dtype=torch.float16), torch.full((1, 1), 4096.0, dtype=torch.float16)
    add_scaled_([grad], [w], [torch.tensor([1.0])], [torch.tensor([1.0])], 2.0, 1.0, backend=backend)
    assert grad.item() == 4100.0


def test_any_grad_layout_is_written(backend: str) -> None:
    weight, factor = torch.randn(4, 6, 3, 3), torch.randn(4)
    wanted = weight * factor.view(-1, 1, 1, 1)
    grads = [
        torch.zeros(4, 6, 3, 3),
        channels_last(torch.zeros(4, 6, 3, 3)),
        torch.zeros(4, 6, 3, 6)[..., ::2],  # gaps
        torch.zeros(3, 3, 6, 4).permute(3, 2, 0, 1),
    ]
    add_scaled_(grads, [weight.clone() for _ in grads], [factor] * 4, backend=backend)
    for grad in grads:
        torch.testing.assert_close(grad, wanted)


def test_parameters_and_their_gradients_can_be_given_as_they_are(backend: str) -> None:
    layer = nn.Linear(3, 2)
    layer(torch.randn(5, 3)).sum().backward()
    before, bias = layer.weight.grad.clone(), layer.bias.grad.clone()  # type: ignore[union-attr]
    grads = [layer.weight.grad, layer.bias.grad]
    add_scaled_(grads, list(layer.parameters()), [torch.ones(2)] * 2, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(layer.weight.grad, before + layer.weight.detach())
    torch.testing.assert_close(layer.bias.grad, bias + layer.bias.detach())
    shrink_(list(layer.parameters()), [torch.zeros(2)] * 2, backend=backend)
    assert not layer.weight.count_nonzero()
    assert layer.weight.requires_grad


def test_a_saved_weight_that_is_shrunk_is_noticed_by_backward(backend: str) -> None:
    weight = torch.randn(3, 3, requires_grad=True)
    loss = (weight * weight).sum()
    shrink_([weight], [torch.zeros(3)], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_empty_lists_do_nothing(backend: str) -> None:
    assert row_column_norms([], backend=backend) == []
    add_scaled_([], [], backend=backend)
    shrink_([], backend=backend)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_in_any_order_of_strides(backend: str, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    order = data.draw(st.permutations(range(len(shape))))
    w = torch.randint(-4, 5, shape).double().permute(order)
    rows, columns = torch.arange(1.0, w.shape[0] + 1), torch.arange(1.0, w.shape[1] + 1) / 16
    grad = torch.zeros_like(w)
    add_scaled_([grad], [w], [rows], [columns], 0.5, 2.0, backend=backend)
    r, q = over(rows, w, 0, 0.0), over(columns, w, 1, 0.0)
    assert torch.equal(grad, w * (r + q + 0.5 * (w.abs() <= 2).double()))
    ((of_rows, of_columns),) = row_column_norms([w], 1, backend=backend)
    assert of_columns is not None
    assert torch.equal(of_rows, w.abs().flatten(1).sum(1))
    assert torch.equal(of_columns, w.abs().transpose(0, 1).flatten(1).sum(1))
    expected = torch.where((w * r * q).abs() <= 1, 0.0, w * r * q)
    shrink_([w], [rows], [columns], 1.0, backend=backend)
    assert torch.equal(w, expected)


def test_bits_do_not_depend_on_the_number_of_threads(fused: str) -> None:
    def all_of_it() -> list[Tensor]:
        torch.manual_seed(1)
        listed = [torch.randn(64, 300, 3, 3), channels_last(torch.randn(300, 64, 3, 3))]
        norms = [n for pair in row_column_norms(listed, backend=fused) for n in pair if n is not None]
        add_scaled_(listed, [w.clone() for w in listed], norms[::2], norms[1::2], 1.0, 0.5, backend=fused)
        shrink_(listed, norms[::2], norms[1::2], 0.1, backend=fused)
        return norms + listed

    before = torch.get_num_threads()
    try:
        outcomes = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outcomes.append(all_of_it())
    finally:
        torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))


# ------------------------------------------------------------------------------------------------------- refusals

W = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(weights=W), TypeError, "weights: expected a sequence of tensors, got one Tensor"),
        (dict(weights=[W.long()]), ValueError, r"weights\[0\]: expected dtype"),
        (dict(weights=[torch.tensor(1.0)]), ValueError, r"weights\[0\]: expected at least one dimension"),
        (dict(weights=[W, W], grads=[W.clone()] * 2), ValueError, r"\[1\]: expected memory of its own, got that"),
        (dict(rows=[]), ValueError, r"rows: expected one for each of the 1 weights, got 0"),
        (dict(rows=torch.ones(2)), TypeError, "rows: expected a list"),
        (dict(rows=[1.0]), TypeError, r"rows\[0\]: expected a Tensor or None, got float"),
        (dict(rows=[torch.ones(3)]), ValueError, r"rows\[0\]: expected shape \(2,\), got \(3,\)"),
        (dict(rows=[torch.ones(2, 1)]), ValueError, r"rows\[0\]: expected shape \(2,\), got \(2, 1\)"),
        (dict(columns=[torch.ones(2)]), ValueError, r"columns\[0\]: expected shape \(3,\), got \(2,\)"),
        (dict(columns=[torch.ones(3).int()]), ValueError, r"columns\[0\]: expected a floating-point dtype"),
        (dict(columns=[torch.ones(3, device="meta")]), ValueError, r"columns\[0\]: expected a tensor on cpu"),
        (dict(tau=-1.0), ValueError, "tau: expected a finite number of 0 or more, got -1.0"),
        (dict(tau=math.nan), ValueError, "tau: expected a finite number of 0 or more, got nan"),
        (dict(tau=[0.0, 1.0]), ValueError, "tau: expected one number, or one for each of the 1 tensors, got 2"),
        (dict(tau="1"), TypeError, "tau: expected a number, or one for each tensor, got str"),
        (dict(tau=True), TypeError, "tau: expected a number, got True"),
        (dict(backend="gpu"), ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_written(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    weight = torch.ones(2, 3)
    good: dict[str, Any] = dict(weights=[weight], rows=[torch.zeros(2)], columns=[torch.zeros(3)], tau=2.0)
    bad = {**good, **change}
    grads = bad.pop("grads", [torch.zeros(2, 3)])
    with pytest.raises(error, match=message):
        add_scaled_(grads, **bad)
    with pytest.raises(error, match=message):
        shrink_(**bad)
    assert weight.eq(1).all()


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([], "grads: expected one for each of the 1 weights, got 0"),
        ([torch.zeros(3, 2)], r"grads\[0\]: expected the shape of weights\[0\], \(2, 3\), got \(3, 2\)"),
        ([torch.zeros(2, 3).half()], r"grads\[0\]: expected the dtype of weights\[0\], torch.float32, got"),
        ([torch.zeros(2, 3, device="meta")], r"grads\[0\]: expected the device of weights\[0\], cpu, got meta"),
    ],
)  # fmt: skip
def test_grads_that_do_not_fit_are_refused(grads: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_scaled_(grads, [torch.ones(2, 3)])


@pytest.mark.parametrize("slope", [math.inf, math.nan, "a", [1.0, 2.0]])
def test_a_slope_that_is_no_finite_number_is_refused(slope: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="slope: expected"):
        add_scaled_([W.clone()], [W], slope=slope)


def test_a_vector_has_no_columns() -> None:
    with pytest.raises(ValueError, match=r"columns\[0\]: expected None, since a weight of shape \(2,\)"):
        shrink_([torch.zeros(2)], columns=[torch.ones(2)])
