"""Errors of landmarks and the curve of faces under an error, against numbers by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from ffr_ext.structured import cumulative, landmark_errors


def face(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """68 points with the outer eye corners at (-0.3, 0) and (0.3, 0): 0.6 apart."""
    points = torch.rand(1, 68, 2, dtype=dtype) - 0.5
    points[0, 36], points[0, 45] = torch.tensor([-0.3, 0.0]), torch.tensor([0.3, 0.0])
    return points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_face_that_is_off_by_a_tenth_of_the_eyes_distance_at_every_point_has_error_a_tenth(
    dtype: torch.dtype,
) -> None:
    target = face(dtype)
    angles = torch.rand(1, 68, dtype=dtype) * 6
    predicted = target + 0.06 * torch.stack([angles.cos(), angles.sin()], -1)
    errors = landmark_errors(predicted, target)
    torch.testing.assert_close(errors, torch.tensor([0.1], dtype=dtype))
    share, area = cumulative(errors)
    assert share == 1  # at or under
    assert area == pytest.approx(0.8, abs=1.1e-3)


def test_the_mean_is_over_points_and_flat_rows_are_points_too() -> None:
    target = face(torch.float64).repeat(2, 1, 1)
    predicted = target.clone()
    predicted[1, 5] += torch.tensor([0.3, 0.4])
    expected = torch.tensor([0, 0.5 / 0.6 / 68], dtype=torch.float64)
    torch.testing.assert_close(landmark_errors(predicted, target), expected)
    torch.testing.assert_close(landmark_errors(predicted.flatten(1), target.flatten(1)), expected)


def test_a_stretched_crop_is_measured_in_pixels_of_its_box() -> None:
    target = face(torch.float64)
    predicted = target + torch.tensor([0.0, 0.1])
    boxes = torch.tensor([[10, 20, 110, 220]], dtype=torch.int32)  # 100 x 200 pixels: y counts twice
    torch.testing.assert_close(landmark_errors(predicted, target), torch.tensor([1 / 6], dtype=torch.float64))
    torch.testing.assert_close(
        landmark_errors(predicted, target, boxes), torch.tensor([1 / 3], dtype=torch.float64)
    )


def test_other_points_and_means_of_points_may_be_the_eyes() -> None:
    target = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [4.0, 0.0], [6.0, 0.0]]])
    predicted = target + torch.tensor([0.0, 1.0])
    assert landmark_errors(predicted, target, left=0, right=3).item() == pytest.approx(1 / 6)
    assert landmark_errors(predicted, target, left=[0, 1], right=range(2, 4)).item() == pytest.approx(1 / 4)


def test_share_and_area_of_errors_by_hand() -> None:
    share, area = cumulative([0.0, 0.05, 0.1, 0.2, 0.9], at=0.1, until=0.5)
    assert share == 0.6
    assert area == pytest.approx((1 + 0.9 + 0.8 + 0.6 + 0) / 5)
    assert cumulative([0.0, 0.0]) == (1, 1)
    assert cumulative([0.6]) == (0, 0)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=20))
def test_the_area_is_exact_to_half_a_step(errors: list[float]) -> None:
    exact = sum(max(0.0, 1 - e / 0.5) for e in errors) / len(errors)
    share, area = cumulative(errors)
    assert area == pytest.approx(exact, abs=1.001e-3)
    assert 0 <= share <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"predicted": torch.rand(1, 67, 2)},
            r"predicted: expected the points of target, \(1, 68, 2\), got \(1, 67, 2\)",
        ),
        ({"predicted": torch.rand(1, 3, 3)}, r"predicted: expected shape \(B, points, 2\)"),
        ({"predicted": torch.full((1, 68, 2), float("nan"))}, r"predicted: expected finite numbers"),
        (
            {"target": torch.zeros(1, 68, 2)},
            r"target: expected eyes apart, got left and right at one place in face 0",
        ),
        ({"left": 68}, r"left: expected points from 0 to 67, got 68"),
        ({"right": []}, r"right: expected points from 0 to 67, got \[\]"),
        ({"box": torch.zeros(1, 4)}, r"box: expected x0 < x1"),
        ({"box": torch.zeros(2, 4)}, r"box: expected shape \(1, 4\), got \(2, 4\)"),
    ],
)
def test_wrong_points_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark_errors(**{"predicted": face(), "target": face(), **options})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"errors": []}, ValueError, r"errors: expected one per face"),
        ({"errors": torch.zeros(2, 2)}, ValueError, r"errors: expected one per face, .* got \(2, 2\)"),
        ({"errors": [0.1, float("nan")]}, ValueError, r"errors: expected numbers >= 0, got NaN or negative"),
        ({"errors": [-0.1]}, ValueError, r"errors: expected numbers >= 0"),
        ({"errors": torch.ones(2).long()}, TypeError, r"errors: expected floating-point numbers"),
        ({"at": 0.0}, ValueError, r"at: expected a number > 0, got 0"),
        ({"until": "1"}, TypeError, r"until: expected a number > 0, got '1'"),
        ({"step": 0.3}, ValueError, r"step: expected a whole number of steps up to 0.5, got 0.3"),
    ],
)
def test_wrong_errors_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        cumulative(**{"errors": [0.1], **options})
