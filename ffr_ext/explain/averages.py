"""`average_visualizations`: the mean of the image patches that a relevant feature responds to most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Layers, batches, channel_dim_of, check_can_repeat, check_model, first_tensor
from .fields import ReceptiveField, fields_of, receptive_fields
from .selection import Selection

__all__ = ["Average", "ReceptiveField", "average_visualizations", "receptive_fields"]


@dataclass(frozen=True)
class Average:
    """What a feature looks at.

    Attributes:
        class_name, layer, channel, weight: The entry of the selection.
        picture: (C, h, w), the mean patch, as large as the receptive field.
        images: How many patches it is the mean of.
        share: How many of these images are of the class (their label, or the model's answer); low for a feature
            that many classes have.
        field: The receptive field.
    """

    class_name: str
    layer: str
    channel: int
    weight: float
    picture: Tensor
    images: int
    share: float
    field: ReceptiveField


def average_visualizations(
    model: nn.Module, loader: Any, selection: Selection, *, images: int = 100
) -> list[Average]:
    """For each entry of a selection, the mean of the patches around its strongest responses.

    Of the ``images`` images in which the channel's largest value is largest, the patch of the receptive field around
    that place, edges repeated, averaged. The recipe is our reading; the paper shows such pictures and the text at hand
    does not say how they are made.

    Args:
        model: In eval mode.
        loader: Yields (images, labels), or images; read twice, so it must give the same images in the same order
            (``shuffle=False``, no random augmentation).
        images: How many patches.

    Returns:
        One `Average` for each of ``selection.entries``, in that order.

    Raises:
        ValueError: a loader that can be read once only, or gives other images the second time; what
            `select_features` refuses.
    """
    check_model(model, "average_visualizations")
    check_can_repeat(loader, "average_visualizations")
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise ValueError(f"images: expected a whole number of at least 1, got {images!r}")
    found = _find(model, loader, selection, images)
    patches = _cut(model, loader, found)
    averages = []
    for entry in selection.entries:
        top = found.strongest[entry.layer]
        column = selection.channels(entry.layer).index(entry.channel)
        of_class = top.classes[:, column] == selection.classes.index(entry.class_name)
        picture = patches[entry.layer][column] / len(of_class)
        averages.append(Average(*entry, picture, len(of_class), float(of_class.double().mean()), top.field))
    return averages


class _Strongest:
    """For each selected channel of a layer its strongest images: (k, channels) values, image numbers, places."""

    def __init__(self, channels: list[int], field: ReceptiveField, images: int) -> None:
        self.channels, self.field, self.images = channels, field, images
        self.values = torch.empty(0, len(channels), dtype=torch.float64)
        self.numbers = torch.empty(0, len(channels), dtype=torch.long)
        self.places = torch.empty(0, len(channels), dtype=torch.long)
        self.classes = torch.empty(0, len(channels), dtype=torch.long)
        self.shape: tuple[int, ...] = ()

    def add(self, feature: Tensor, first: int, classes: Tensor) -> None:
        self.shape = tuple(feature.shape[2:])
        values, places = feature.flatten(2).double().max(2)
        numbers = torch.arange(first, first + len(values))[:, None].expand(-1, len(self.channels))
        every = torch.cat([self.values, values.cpu()])
        best = every.topk(min(self.images, len(every)), 0)
        self.values = best.values
        for name, added in (
            ("numbers", numbers),
            ("places", places.cpu()),
            ("classes", classes[:, None].expand_as(numbers)),
        ):
            setattr(self, name, torch.cat([getattr(self, name), added]).gather(0, best.indices))


@dataclass
class _Found:
    strongest: dict[str, _Strongest]
    fingerprints: list[tuple[float, ...]]  # of all images, in the order of the loader


def _find(model: nn.Module, loader: Any, selection: Selection, images: int) -> _Found:
    """The first pass."""
    found = _Found({}, [])
    layers = selection.modules(model)
    wanted = {name: channels for name in selection.layers if (channels := selection.channels(name))}
    maps: dict[str, Tensor] = {}
    widths: dict[str, int] = {}

    def take(name: str, module: nn.Module, feature: Tensor) -> None:
        feature = feature.detach().movedim(channel_dim_of(model, feature, selection.channel_dim), 1)
        widths[name] = feature.shape[1]
        if name in wanted and feature.shape[1] == selection.layers[name]:
            feature = feature[:, wanted[name]]  # a copy: what follows may overwrite the layer's output
            maps[name] = feature if feature.dim() > 2 else feature[:, :, None]

    for x, labels in batches(loader, model, "average_visualizations"):
        with torch.no_grad(), Layers(model, layers, take) as run:
            output = run(x)
        selection.check_fits(widths, "average_visualizations")
        if not found.strongest:
            fields = fields_of(model, x, layers, selection.channel_dim)
            found.strongest = {name: _Strongest(wanted[name], fields[name], images) for name in wanted}
        classes = _classes(output, labels)
        for name, top in found.strongest.items():
            top.add(maps[name], len(found.fingerprints), classes)
        found.fingerprints += _fingerprints(x)
    return found


def _classes(output: Any, labels: Tensor | None) -> Tensor:
    if labels is not None:
        return labels.cpu().long()
    logits = first_tensor(output)
    if logits is None or logits.dim() != 2:
        raise ValueError("loader: expected (images, labels), or a model that returns logits (B, classes)")
    return logits.argmax(1).cpu()


def _fingerprints(x: Tensor) -> list[tuple[float, ...]]:
    """Enough of each image to see that it is another one."""
    flat = x.flatten(1).cpu()
    return list(zip(flat.sum(1).tolist(), flat[:, flat.shape[1] // 2].tolist(), strict=True))


def _cut(model: nn.Module, loader: Any, found: _Found) -> dict[str, list[Tensor]]:
    """The second pass: sums of patches, one for each selected channel."""
    wanted: dict[int, list[tuple[str, int, int]]] = {}  # image -> (layer, column, place)
    for name, top in found.strongest.items():
        for column in range(len(top.channels)):
            for number, place in zip(
                top.numbers[:, column].tolist(), top.places[:, column].tolist(), strict=True
            ):
                wanted.setdefault(number, []).append((name, column, place))
    sums: dict[str, list[Tensor]] = {}
    for number, image, fingerprint in _images(model, loader):
        if number >= len(found.fingerprints) or fingerprint != found.fingerprints[number]:
            raise ValueError(
                f"average_visualizations: loader: image {number} is another one in the second pass; it must give the "
                "same images in the same order (shuffle=False, no random augmentation)"
            )
        for name, column, place in wanted.get(number, []):
            top = found.strongest[name]
            patch = _patch(image, top.field, top.shape, place)
            if name not in sums:
                sums[name] = [torch.zeros_like(patch) for _ in top.channels]
            sums[name][column] += patch
    return sums


def _images(model: nn.Module, loader: Any) -> Iterator[tuple[int, Tensor, tuple[float, ...]]]:
    number = 0
    for x, _ in batches(loader, model, "average_visualizations"):
        for image, seen in zip(x.cpu().double(), _fingerprints(x), strict=True):
            yield number, image, seen
            number += 1


def _patch(image: Tensor, field: ReceptiveField, shape: tuple[int, ...], place: int) -> Tensor:
    """The field of the unit at the flat index ``place`` of a map of ``shape``, edges repeated."""
    if field.whole:
        return image
    unit: list[int] = []
    for length in reversed(shape):
        place, index = divmod(place, length)
        unit.insert(0, index)
    patch = image
    for axis, (corner, size) in enumerate(zip(field.corner(tuple(unit)), field.size, strict=True)):
        taken = torch.arange(corner, corner + size).clamp(0, image.shape[1 + axis] - 1)
        patch = patch.index_select(1 + axis, taken)
    return patch
