"""Do explanations find the part that tells the class? Drawn flowers with part masks, and the table of all methods.

    python examples/flowers.py                              # 3 seeds, prints the tables and writes runs/flowers
    python examples/flowers.py --seeds 0 --variants single  # a minute
    python examples/flowers.py --an8flower PATH             # the published images, in their own folders

`flowers` is an an8Flower-like generator, not an8Flower (Oramas, Wang, Tuytelaars, ICLR 2019), whose images are renders
and are not shipped here: a flower's class is the colour of one part (petals or stem), and discs and squares in the same
colours lie behind the plant, so that colour alone says nothing. `read_an8flower` reads the published folders.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COLOURS = {
    "red": (0.85, 0.12, 0.15),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.90, 0.20),
    "blue": (0.20, 0.35, 0.90),
    "violet": (0.55, 0.20, 0.75),
    "pink": (0.95, 0.55, 0.75),
}
GREEN, BROWN, NEUTRAL = (0.20, 0.55, 0.20), (0.40, 0.25, 0.12), (0.88, 0.88, 0.84)
VARIANTS = ("single", "double")


class Flowers(NamedTuple):
    """Images (n, 3, S, S) in [0, 1], labels (n,), masks (n, S, S) bool of the part that tells, names of the classes."""

    images: Tensor
    labels: Tensor
    masks: Tensor
    classes: tuple[str, ...]


def flowers(
    n: int, variant: str = "single", size: int = 64, distractors: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw ``n`` flowers: images, labels, masks; `class_names` names the classes.

    "single": six classes, the colour of the petals; the mask is the visible petals. "double": twelve, the colour of the
    petals above a green stem, or that of the stem below pale petals; the mask is that part. As many of each class as
    ``n`` allows, in random order; the same ``seed`` draws the same images.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    if n < 1 or size < 16 or distractors < 0:
        raise ValueError(
            f"expected n >= 1, size >= 16 and distractors >= 0, got {n}, {size} and {distractors}"
        )
    random = np.random.default_rng(seed)
    classes = len(class_names(variant))
    labels = random.permutation(np.arange(n) % classes)
    images = np.empty((n, 3, size, size), np.float32)
    masks = np.empty((n, size, size), bool)
    for index, label in enumerate(labels):
        images[index], masks[index] = _flower(random, int(label), size, distractors)
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(masks)


def class_names(variant: str) -> tuple[str, ...]:
    petals = tuple(COLOURS)
    return (
        petals
        if variant == "single"
        else tuple(f"{c} petals" for c in petals) + tuple(f"{c} stem" for c in petals)
    )


class _Canvas:
    """Parts are laid one over the other; each hides what is behind it by its coverage in [0, 1]."""

    def __init__(self, picture: np.ndarray) -> None:
        self.picture = picture
        size = picture.shape[-1]
        self.y, self.x = np.mgrid[0:size, 0:size].astype(np.float32) / size
        self.edge = 1.0 / size  # half the width of a soft edge
        self.seen: dict[str, np.ndarray] = {}

    def lay(
        self, distance: np.ndarray, colour: tuple[float, ...], shade: float = 1.0, part: str = ""
    ) -> None:
        """``distance`` < 0 is inside, in units of the image's side."""
        cover = np.clip(0.5 - distance / (2 * self.edge), 0, 1)
        self.picture += cover * (np.array(colour, np.float32)[:, None, None] * shade - self.picture)
        for name in self.seen:
            self.seen[name] = self.seen[name] * (1 - cover)
        if part:
            self.seen[part] = self.seen.get(part, 0) + cover


def _flower(
    random: np.random.Generator, label: int, size: int, distractors: int
) -> tuple[np.ndarray, np.ndarray]:
    names = list(COLOURS.values())
    tells = "petals" if label < len(names) else "stem"
    colour = names[label % len(names)]
    canvas = _Canvas(_background(random, size))
    for _ in range(distractors):
        _distractor(canvas, random, names[random.integers(len(names))])
    shade = random.uniform(0.8, 1.1)
    head = random.uniform([0.33, 0.25], [0.67, 0.45])
    _stem(canvas, random, head, colour if tells == "stem" else GREEN, shade)
    _petals(canvas, random, head, colour if tells == "petals" else NEUTRAL, shade)
    noise = random.normal(0, 0.02, canvas.picture.shape)
    return np.clip(canvas.picture + noise, 0, 1), canvas.seen[tells] > 0.5


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    """A tinted grey that changes along a random direction."""
    grey = random.uniform(0.3, 0.7) + random.uniform(-0.1, 0.1, (3, 1, 1))
    slope = random.uniform(-0.25, 0.25, 2)
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    return (grey + slope[0] * x + slope[1] * y).astype(np.float32)


def _distractor(canvas: _Canvas, random: np.random.Generator, colour: tuple[float, ...]) -> None:
    cx, cy, radius = random.uniform(0.1, 0.9), random.uniform(0.1, 0.9), random.uniform(0.05, 0.12)
    dx, dy = np.abs(canvas.x - cx), np.abs(canvas.y - cy)
    distance = np.hypot(dx, dy) if random.random() < 0.5 else np.maximum(dx, dy)
    canvas.lay(distance - radius, colour, random.uniform(0.8, 1.1))


def _stem(
    canvas: _Canvas, random: np.random.Generator, head: np.ndarray, colour: tuple[float, ...], shade: float
) -> None:
    """A bowed stem from the lower edge to the head, and two leaves that hang on it."""
    foot = np.array([random.uniform(0.3, 0.7), 1.05])
    bow = (foot + head) / 2 + [random.uniform(-0.15, 0.15), 0]
    t = np.linspace(0, 1, 9)[:, None]
    points = (1 - t) ** 2 * foot + 2 * t * (1 - t) * bow + t**2 * head
    distance = np.min([_segment(canvas, a, b) for a, b in itertools.pairwise(points)], axis=0)
    canvas.lay(distance - random.uniform(0.018, 0.028), colour, shade, "stem")
    for side in (-1, 1):
        at = points[random.integers(2, 5)]
        angle = side * random.uniform(0.5, 1.1)
        length = random.uniform(0.08, 0.13)
        centre = at + length * np.array([np.sin(angle), -np.cos(angle)])
        canvas.lay(_ellipse(canvas, centre, length, 0.04, angle), GREEN, random.uniform(0.7, 1.1))


def _petals(
    canvas: _Canvas, random: np.random.Generator, head: np.ndarray, colour: tuple[float, ...], shade: float
) -> None:
    """Five to eight ellipses around a brown disc, seen from a random side."""
    count, turn, tilt = random.integers(5, 9), random.uniform(0, 2 * np.pi), random.uniform(0.65, 1.0)
    length, width = random.uniform(0.08, 0.12), random.uniform(0.045, 0.06)
    rings = []
    for angle in turn + 2 * np.pi * np.arange(count) / count:
        centre = length * 1.1 * np.array([np.sin(angle), -np.cos(angle)])
        rings.append(_ellipse(canvas, centre, length, width, angle, tilt, head))
    canvas.lay(np.min(rings, axis=0), colour, shade, "petals")
    disc = np.hypot(canvas.x - head[0], (canvas.y - head[1]) / tilt) - random.uniform(0.04, 0.06)
    canvas.lay(disc, BROWN)


def _segment(canvas: _Canvas, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    along = b - a
    t = ((canvas.x - a[0]) * along[0] + (canvas.y - a[1]) * along[1]) / max(float(along @ along), 1e-9)
    t = np.clip(t, 0, 1)
    return np.hypot(canvas.x - a[0] - t * along[0], canvas.y - a[1] - t * along[1])


def _ellipse(
    canvas: _Canvas,
    centre: np.ndarray,
    length: float,
    width: float,
    angle: float,
    tilt: float = 1.0,
    origin: np.ndarray | None = None,
) -> np.ndarray:
    """About the distance to an ellipse whose long half axis points along ``angle`` from upright."""
    ox, oy = (0.0, 0.0) if origin is None else origin
    x, y = canvas.x - ox - centre[0], (canvas.y - oy) / tilt - centre[1]
    along, across = x * np.sin(angle) - y * np.cos(angle), x * np.cos(angle) + y * np.sin(angle)
    return (np.hypot(along / length, across / width) - 1) * min(length, width)


def read_an8flower(folder: str | Path, size: int = 128) -> Flowers:
    """The published an8Flower: ``NAME/<class>/*`` and ``NAME_MASK/<class>/*``, in the same order, resized.

    ``folder`` is ``.../an8Flower_double_12c`` (or ``_single_6c``). A mask is where any colour of the mask image is
    above half. Images whose mask is empty at this size are refused by name.
    """
    from PIL import Image

    images_at = Path(folder)
    masks_at = images_at.with_name(f"{images_at.name}_MASK")
    for path in (images_at, masks_at):
        if not path.is_dir():
            raise FileNotFoundError(
                f"an8flower: {path} is no folder; expected {images_at.name} and {masks_at.name} side by side"
            )
    classes = sorted(path.name for path in images_at.iterdir() if path.is_dir())
    if not classes:
        raise FileNotFoundError(f"an8flower: {images_at} has no folder for each class")

    def read(path: Path) -> Tensor:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB").resize((size, size)))).movedim(-1, 0) / 255

    images, labels, masks = [], [], []
    for label, name in enumerate(classes):
        pictures = sorted(path for path in (images_at / name).iterdir() if path.is_file())
        parts = (
            sorted(path for path in (masks_at / name).iterdir() if path.is_file())
            if (masks_at / name).is_dir()
            else []
        )
        if len(pictures) != len(parts):
            raise ValueError(f"an8flower: {name}: {len(pictures)} images and {len(parts)} masks")
        for picture, part in zip(pictures, parts, strict=True):
            mask = read(part).amax(0) > 0.5
            if not bool(mask.any()):
                raise ValueError(f"an8flower: the mask {part} is empty")
            images.append(read(picture))
            masks.append(mask)
            labels.append(label)
    return Flowers(torch.stack(images), torch.tensor(labels), torch.stack(masks), tuple(classes))


def main(argv: list[str] | None = None) -> None:
    from explaining import study

    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument(
        "--variants", nargs="+", default=list(study.VARIANTS), choices=list(study.VARIANTS)
    )
    arguments.add_argument("--epochs", type=int, default=study.EPOCHS)
    arguments.add_argument("--train", type=int, default=1200, help="images to train on")
    arguments.add_argument("--test", type=int, default=240, help="images to explain")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--an8flower", type=Path, help="folder .../an8Flower_double_12c or _single_6c")
    arguments.add_argument("--out", type=Path, default=Path("runs/flowers"))
    options = arguments.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.an8flower:
        data = read_an8flower(options.an8flower)
        study.run_published(data, options.seeds, options.epochs, options.out)
    else:
        study.run(options.variants, options.seeds, options.epochs, options.train, options.test, options.out)


if __name__ == "__main__":
    main()
