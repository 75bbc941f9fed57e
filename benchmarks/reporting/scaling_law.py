"""Time and memory of the loss as a law: fixed cost + cost per feature + cost per byte."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Law:
    """ms = fixed + per_feature L + bytes / bandwidth, fitted to the smallest relative error."""

    fixed_us: float
    per_feature_us: float
    gbps: float
    worst_percent: float  # largest deviation of a measurement from the law
    median_percent: float
    points: int


def fit(rows: Sequence[dict[str, Any]]) -> Law | None:
    """The law of these rows, or None if there are too few. No cost is negative."""
    if len(rows) < 4:
        return None
    times = np.array([row["ms"] for row in rows]) * 1e3
    inputs = np.array([[1.0, row["features"], row["bytes"] / 1e3] for row in rows])
    weighted = inputs / times[:, None]  # least squares of relative errors
    costs = _nonnegative_least_squares(weighted, np.ones(len(rows)))
    deviation = np.abs(weighted @ costs - 1) * 100
    gbps = float("inf") if costs[2] == 0 else 1 / costs[2]
    return Law(
        float(costs[0]),
        float(costs[1]),
        float(gbps),
        float(deviation.max()),
        float(np.median(deviation)),
        len(rows),
    )


def _nonnegative_least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The best of the least-squares solutions over subsets of the columns that has no negative entry."""
    best, solution = np.inf, np.zeros(a.shape[1])
    for mask in range(1, 1 << a.shape[1]):
        columns = [j for j in range(a.shape[1]) if mask >> j & 1]
        found = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
        distance = float(np.square(a[:, columns] @ found - b).sum())
        if (found >= 0).all() and distance < best:
            best, solution = distance, np.zeros(a.shape[1])
            solution[columns] = found
    return solution


def memory_per_element(rows: Iterable[dict[str, Any]]) -> tuple[float, float]:
    """Peak memory of forward + backward as (fixed bytes, bytes per element), by least squares."""
    rows = [row for row in rows if row["peak_bytes"] is not None]
    inputs = np.array([[1.0, row["elements"]] for row in rows])
    peaks = np.array([row["peak_bytes"] for row in rows], dtype=float)
    fixed, slope = np.linalg.lstsq(inputs, peaks, rcond=None)[0]
    return float(fixed), float(slope)


def law_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The laws of every provider and dtype, as Markdown lines."""
    lines = []
    for provider in dict.fromkeys(row["provider"] for row in rows if row["provider"] != "copy"):
        of_provider = [row for row in rows if row["provider"] == provider]
        for dtype in dict.fromkeys(row["dtype"] for row in of_provider):
            chosen = [row for row in of_provider if row["dtype"] == dtype]
            law = fit(chosen)
            if law is None:
                continue
            text = (
                f"- {provider}, {dtype}: time = {law.fixed_us:.0f} us + {law.per_feature_us:.2f} us x "
                f"features + bytes / ({law.gbps:.1f} GB/s); {law.points} points, median deviation "
                f"{law.median_percent:.0f} %, largest {law.worst_percent:.0f} %"
            )
            if all(row["peak_bytes"] is not None for row in chosen):
                _, slope = memory_per_element(chosen)
                text += f". Peak memory: {slope:.2f} bytes per element"
            lines.append(text + ".")
    return lines
