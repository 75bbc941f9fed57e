"""Pages of heatmaps and of average patches, with matplotlib (``ffr-ext[explain]``), which loads when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .averages import Average
from .heatmaps import Explanation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'ffr-ext[explain]'") from error
    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def draw_explanation(
    images: Tensor,
    explanation: Explanation,
    *,
    masks: Tensor | None = None,
    classes: Sequence[str] | None = None,
) -> Figure:
    """A row for each image: the image (with its mask's outline), the combined heat, and the heat of each feature.

    ``images`` (B, C, H, W) are stretched to the range they have. Returns a figure; ``.savefig(path)`` writes it.
    """
    top = explanation.parts.shape[1]
    figure = _figure(1.5 * (2 + top), 1.65 * len(images))
    axes = figure.subplots(len(images), 2 + top, squeeze=False)
    for row, image in enumerate(images):
        target = int(explanation.target[row])
        _show(axes[row, 0], image, classes[target] if classes else f"class {target}")
        if masks is not None:
            axes[row, 0].contour(masks[row].cpu().numpy(), levels=[0.5], colors="red", linewidths=0.8)
        _heat(axes[row, 1], explanation.heat[row], "combined")
        for rank, feature in enumerate(explanation.features[row]):
            name = f"{feature.layer} [{feature.channel}]\n{feature.response:.2f}" if feature else "no feature"
            _heat(axes[row, 2 + rank], explanation.parts[row, rank], name)
    return figure


def draw_averages(averages: Sequence[Average], *, per_class: int = 6) -> Figure:
    """A row for each class: its heaviest features' mean patches, with layer, channel, and the share of the class."""
    names = list(dict.fromkeys(average.class_name for average in averages))
    figure = _figure(1.35 * per_class, 1.75 * max(len(names), 1))
    axes = figure.subplots(max(len(names), 1), per_class, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, name in enumerate(names):
        for column, average in enumerate([a for a in averages if a.class_name == name][:per_class]):
            title = f"{average.layer} [{average.channel}]\n{average.share:.0%} of the class"
            _show(axes[row, column], average.picture, f"{name}: {title}" if column == 0 else title)
    return figure


def _show(axis: Any, image: Tensor, title: str) -> None:
    picture = image.detach().cpu().float()
    low, high = picture.min(), picture.max()
    picture = (picture - low) / (high - low).clamp(min=1e-12)
    if picture.shape[0] not in (1, 3):
        picture = picture.mean(0, keepdim=True)
    channels_last = picture[0] if picture.shape[0] == 1 else picture.movedim(0, -1)
    axis.imshow(channels_last.numpy(), cmap="gray", interpolation="nearest")
    _plain(axis, title)


def _heat(axis: Any, heat: Tensor, title: str) -> None:
    axis.imshow(heat.detach().cpu().to(torch.float32).numpy(), cmap="inferno", vmin=0, vmax=1)
    _plain(axis, title)


def _plain(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=7)
    axis.axis("off")
