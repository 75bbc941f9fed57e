"""Rows and columns of weights on a GPU: results, repeatability, streams, sizes past 32 bits."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_oracle import ALL_DTYPES
from torch import Tensor

from ffr_ext import backends
from ffr_ext.regularizers.fused import add_scaled_, row_column_norms, shrink_

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    status = backends.available()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param!r}: {status.reason}")
    return str(request.param)


def weights(dtype: torch.dtype) -> list[Tensor]:
    made = [
        torch.randn(64, 130, 3, 3),
        torch.randn(130, 64, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(1000, 513),
        torch.randn(513, 1000).t(),
        torch.randn(512, 1, 3, 3),
        torch.randn(3000),
        torch.randn(3, 0),
        torch.randn(1 + 64 * 64)[1:].view(64, 64),
    ]
    on_gpu = [w.to("cuda", dtype) for w in made]
    on_gpu[-1] = torch.randn(1 + 64 * 64, device="cuda").to(dtype)[1:].view(64, 64)  # off a whole access
    return on_gpu


def factors(weights: list[Tensor], dim: int) -> list[Tensor | None]:
    return [
        torch.randn(w.shape[dim], device="cuda") if w.dim() > dim and i % 3 else None
        for i, w in enumerate(weights)
    ]


def near(got: Tensor, truth: Tensor) -> None:
    compute = torch.float64 if got.dtype == torch.float64 else torch.float32
    allowed = torch.finfo(got.dtype).eps * truth.abs() + 16 * torch.finfo(compute).eps
    assert ((got.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_norms(dtype: torch.dtype, p: float, backend: str) -> None:
    listed = weights(dtype)
    truth = row_column_norms([w.double() for w in listed], p, backend="reference")
    for ours, expected in zip(row_column_norms(listed, p, backend=backend), truth, strict=True):
        for got, wanted in zip(ours, expected, strict=True):
            if got is not None and wanted is not None:
                torch.testing.assert_close(got, wanted.to(got.dtype))


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_scaling(dtype: torch.dtype, backend: str) -> None:
    listed = weights(dtype)
    rows, columns = factors(listed, 0), factors(listed, 1)
    grads = [torch.randn_like(w) for w in listed]
    exact = [g.double() for g in grads]
    add_scaled_(grads, listed, rows, columns, -0.7, 0.5, backend=backend)
    add_scaled_(exact, [w.double() for w in listed], rows, columns, -0.7, 0.5, backend="reference")
    for got, truth in zip(grads, exact, strict=True):
        near(got, truth)
    exact = [w.double() for w in listed]
    shrink_(listed, rows, columns, backend=backend)
    shrink_(exact, rows, columns, backend="reference")
    for got, truth in zip(listed, exact, strict=True):
        near(got, truth)


def test_the_same_bits_every_time(backend: str) -> None:
    listed = weights(torch.float32)
    once, again = (row_column_norms(listed, backend=backend) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        for a, b in zip(first, second, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


def test_on_another_stream(backend: str) -> None:
    listed, stream = weights(torch.float32), torch.cuda.Stream()
    before = [w.clone() for w in listed]
    with torch.cuda.stream(stream):
        for w in listed:
            w.mul_(2)
        shrink_(listed, factors(listed, 0), tau=0.1, backend=backend)
        norms = row_column_norms(listed, backend=backend)
    stream.synchronize()
    assert all(w.isfinite().all() for w in listed)
    assert all(rows.isfinite().all() for rows, _ in norms)
    assert any((w != b).any() for w, b in zip(listed, before, strict=True))


@pytest.mark.slow
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB")
    rows, columns = 2**16 + 1, 2**15 + 8
    weight = torch.ones(rows, columns, dtype=torch.float16, device="cuda")
    factor = torch.zeros(rows, device="cuda")
    factor[-1] = 2
    shrink_([weight], [factor + 1], backend=backend)
    assert weight[-1].eq(3).all()
    assert weight[-2].eq(1).all()
    ((of_rows, of_columns),) = row_column_norms([weight], 1, backend=backend)
    assert of_columns is not None
    assert of_rows[-1].item() == 3 * columns
    assert of_columns.eq(rows + 2).all()
