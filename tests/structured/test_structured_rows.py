"""Batches with missing inputs and labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ffr_ext.structured import split

NAN = float("nan")


def test_rows_of_nan_are_missing() -> None:
    x, y = torch.arange(12.0).reshape(6, 2), torch.arange(18.0).reshape(6, 3)
    x[[1, 4]], y[[0, 4, 5]] = NAN, NAN
    (x_p, y_p), x_all, y_all = split(x, y)
    assert torch.equal(x_p, x[[2, 3]])
    assert torch.equal(y_p, y[[2, 3]])
    assert torch.equal(x_all, x[[0, 2, 3, 5]])
    assert torch.equal(y_all, y[[1, 2, 3]])  # row 4 has neither and is nowhere


def test_images_are_rows_too() -> None:
    x, y = torch.rand(3, 1, 4, 4), torch.rand(3, 2)
    x[0] = NAN
    paired, x_all, y_all = split(x, y)
    assert (paired[0].shape, x_all.shape, y_all.shape) == ((2, 1, 4, 4), (2, 1, 4, 4), (3, 2))


@pytest.mark.parametrize("missing", ["x", "y"])
def test_a_batch_may_have_no_pair(missing: str) -> None:
    data = {"x": torch.rand(3, 2), "y": torch.rand(3, 4)}
    data[missing][:] = NAN
    (x_p, y_p), x_all, y_all = split(**data)
    assert (len(x_p), len(y_p)) == (0, 0)
    assert (len(x_all), len(y_all)) == ((0, 3) if missing == "x" else (3, 0))
    assert split(torch.rand(0, 2), torch.rand(0, 3)).x_all.shape == (0, 2)


@pytest.mark.parametrize(
    ("x", "y", "kind", "message"),
    [
        (
            torch.tensor([[1.0, NAN]]),
            torch.ones(1, 2),
            ValueError,
            r"x: expected rows that are NaN as a whole.*1 of 2 NaN in row 0",
        ),
        (torch.ones(2, 2), torch.ones(3, 2), ValueError, r"x, y: expected as many rows, got 2 and 3"),
        (torch.ones(2), torch.ones(2, 2), ValueError, r"x: expected rows of shape"),
        (torch.ones(2, 0), torch.ones(2, 2), ValueError, r"x: expected rows of shape"),
        (
            torch.ones(2, 2),
            torch.ones(2, 2).long(),
            TypeError,
            r"y: expected a floating-point tensor, got torch.int64",
        ),
        (torch.ones(2, 2), None, TypeError, r"y: expected a tensor, got NoneType"),
    ],
)
def test_other_batches_are_refused(x: Any, y: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        split(x, y)
