"""The plots of the report. Colours: one per provider, the same in every plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Line = dict[str, Any]
COLOURS = {
    "eager": "#888888",
    "compile": "#dd8452",
    "cpu": "#4c72b0",
    "cuda": "#4c72b0",
    "triton": "#55a868",
    "ffr_loss": "#4c72b0",
    "FeatureFlow": "#c44e52",
    "none": "#000000",
    "copy": "#000000",
}
LABELS = {"compile": "torch.compile", "none": "no penalty", "copy": "copy"}


def draw_all(machines: dict[str, dict[str, tuple[Line, list[Line]]]], directory: Path) -> list[Path]:
    """Every plot that the results have data for; the paths of what was written."""
    written = []
    for machine, benches in machines.items():
        for bench, name, draw in (
            ("loss", "speedup", speedup_by_size),
            ("loss", "roofline", roofline),
            ("step", "memory", memory_over_time),
            ("scaling", "scaling", scaling),
        ):
            if bench not in benches:
                continue
            figure = draw(benches[bench][1])
            if figure is None:
                continue
            path = directory / f"{name}-{machine}.png"
            # The date and the version of matplotlib would make every file differ from the last one.
            figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            written.append(path)
    return written


def _finish(axes: Axes, x: str, y: str, title: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _of(rows: Sequence[Line], **wanted: Any) -> list[Line]:
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def _providers(rows: Sequence[Line]) -> list[str]:
    return [name for name in COLOURS if any(row["provider"] == name for row in rows)]


def speedup_by_size(rows: Sequence[Line]) -> Any:
    """Forward + backward of ResNet-56's features against eager, from batch 1 up."""
    dtype, layout = _usual_form(rows)
    chosen = _of(rows, setting="resnet56", mode="both", norm="l1", dtype=dtype, layout=layout)
    chosen = [row for row in chosen if row["curvature_kind"] == "difference"]
    eager = {row["batch"]: row["ms"] for row in chosen if row["provider"] == "eager"}
    if len(eager) < 2:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name in _providers(chosen):
        if name == "copy":
            continue
        points = sorted(
            (r["feature_bytes"] / 1e6, eager[r["batch"]] / r["ms"]) for r in _of(chosen, provider=name)
        )
        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=LABELS.get(name, name))
    axes.set_xscale("log")
    title = f"ResNet-56 features, l1, forward + backward, {dtype}, {layout}"
    _finish(axes, "bytes of the features (MB)", "speed-up over eager", title)
    return figure


def _usual_form(rows: Sequence[Line]) -> tuple[str, str]:
    return ("bfloat16", "channels_last") if rows[0]["device"] == "cuda" else ("float32", "contiguous")


def roofline(rows: Sequence[Line]) -> Any:
    """Bandwidth against bytes. The roof is a copy of as many bytes: the loss does too few operations for
    another.
    """
    chosen = [row for row in rows if row["mode"] == "both" and row["gbps"] and row["norm"] == "l1"]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name in _providers(chosen):
        points = sorted((row["bytes"] / 1e6, row["gbps"]) for row in _of(chosen, provider=name))
        style = "--" if name == "copy" else "o"
        axes.plot(*zip(*points, strict=True), style, color=COLOURS[name], ms=4, label=LABELS.get(name, name))
    axes.set_xscale("log")
    axes.set_yscale("log")
    title = "All l1 cases, forward + backward: bytes that must move / time"
    _finish(axes, "bytes that must move (MB)", "GB/s", title)
    return figure


def memory_over_time(rows: Sequence[Line]) -> Any:
    """Bytes held during one training step, of the largest network measured."""
    rows = [row for row in rows if row.get("timeline")]
    if not rows:
        return None
    case = max(rows, key=lambda row: row["feature_bytes"])["case"]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for row in _of(rows, case=case):
        # The profiler slows the step down, and each provider by another factor: per cent of the step instead.
        end = row["timeline"][-1][0] or 1.0
        share = [100 * when / end for when, _ in row["timeline"]]
        held = [size / 1e6 for _, size in row["timeline"]]
        name = row["provider"]
        axes.step(share, held, where="post", color=COLOURS[name], label=LABELS.get(name, name), lw=1.2)
    _finish(axes, "per cent of the step", "MB held above the start", f"Memory over one training step, {case}")
    return figure


def scaling(rows: Sequence[Line]) -> Any:
    """Time against depth at a fixed size, and against size at a fixed depth."""
    figure, (by_depth, by_size) = plt.subplots(1, 2, figsize=(9, 3.6))
    for axes, prefix, key in ((by_depth, "L", "features"), (by_size, "N", "elements")):
        for name in _providers(rows):
            for dtype, style in (("float32", "o-"), ("bfloat16", "s:")):
                chosen = [r for r in _of(rows, provider=name, dtype=dtype) if r["setting"].startswith(prefix)]
                points = sorted((row[key], row["ms"]) for row in chosen)
                if points:
                    label = f"{LABELS.get(name, name)}, {dtype}"
                    axes.plot(*zip(*points, strict=True), style, color=COLOURS[name], ms=3, lw=1, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    _finish(by_depth, "features (L)", "ms, forward + backward", "depth, features of one size")
    _finish(by_size, "elements of all 8 features", "ms, forward + backward", "size, 8 features")
    return figure
