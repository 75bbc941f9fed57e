"""Images for the examples: scikit-learn's bundled digits, and CIFAR-10/100, MNIST and Fashion-MNIST from a folder in
their published formats.

Nothing is downloaded. CIFAR: https://www.cs.toronto.edu/~kriz/cifar.html, "python version" or "binary version". MNIST
and Fashion-MNIST: the four IDX files, packed (.gz) or not; Debian has the latter in the package dataset-fashion-mnist.
"""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

DATA = ("digits", "cifar10", "cifar100", "mnist", "fashion-mnist")
PIXELS = 3 * 32 * 32


@dataclass
class Images:
    """Normalised float32 images (N, C, H, W) and int64 labels (N,)."""

    name: str
    classes: int
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    augment: bool  # random crops and flips, as is usual for CIFAR; digits must not be mirrored

    @property
    def channels(self) -> int:
        return self.train_x.shape[1]


def load(name: str, folder: str | Path | None = None) -> Images:
    """``"digits"``, or another name of `DATA` with the folder that holds its files."""
    if name == "digits":
        return digits()
    if name not in DATA:
        raise ValueError(f"data: expected one of {', '.join(DATA)}, got {name!r}")
    if folder is None:
        raise ValueError(f"data-dir: {name} needs the folder of its files; nothing is downloaded")
    return cifar(name, Path(folder)) if name.startswith("cifar") else idx(name, Path(folder))


def digits() -> Images:
    """8x8 handwritten digits: 1,437 training and 360 test images, split once and for all."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    x = bunch.images.astype(np.float32)[:, None] / 16
    parts = train_test_split(
        x, bunch.target.astype(np.int64), test_size=0.2, random_state=0, stratify=bunch.target
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return _normalised("digits", 10, train_x, train_y, test_x, test_y, augment=False)


def cifar(name: str, folder: Path) -> Images:
    """CIFAR-10 or CIFAR-100 in the binary or the Python format, whichever the folder holds."""
    hundred = name == "cifar100"
    classes = 100 if hundred else 10
    formats = {
        "binary": (["train.bin"], ["test.bin"]) if hundred else (_batches(".bin"), ["test_batch.bin"]),
        "python": (["train"], ["test"]) if hundred else (_batches(""), ["test_batch"]),
    }
    where, kind = _find(name, folder, formats)
    read = _read_binary if kind == "binary" else _read_python
    parts = []
    for files in formats[kind]:
        images, labels = zip(*(read(where / file, hundred) for file in files), strict=True)
        pixels = torch.from_numpy(np.concatenate(images)).view(-1, 3, 32, 32).float() / 255
        answers = torch.from_numpy(np.concatenate(labels)).long()
        if len(answers) and int(answers.max()) >= classes:
            raise ValueError(
                f"{where}: label {int(answers.max())} does not exist in {name}; is this another data set?"
            )
        parts += [pixels, answers]
    return _normalised(name, classes, *parts, augment=True)


def _batches(suffix: str) -> list[str]:
    return [f"data_batch_{i}{suffix}" for i in range(1, 6)]


def _find(name: str, folder: Path, formats: dict[str, tuple[list[str], list[str]]]) -> tuple[Path, str]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data-dir: {folder} is {'a file' if folder.exists() else 'not there'}; expected a folder"
        )
    archive = {"cifar10": "cifar-10-batches", "cifar100": "cifar-100"}[name]
    candidates = [folder, folder / f"{archive}-bin", folder / f"{archive}-binary", folder / f"{archive}-py"]
    candidates.append(folder / f"{archive}-python")
    nearest, most = "", -1
    for candidate in candidates:
        for kind, files in formats.items():
            wanted = [file for group in files for file in group]
            missing = [file for file in wanted if not (candidate / file).is_file()]
            if not missing:
                return candidate, kind
            if len(wanted) - len(missing) > most:
                most, nearest = (
                    len(wanted) - len(missing),
                    f"{kind} format: {candidate} lacks {', '.join(missing)}",
                )
    present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise FileNotFoundError(
        f"data-dir: {folder} does not hold {name}. Expected {' + '.join(map(str, formats['binary'][0]))} and "
        f"{formats['binary'][1][0]} (binary) or the same names of the Python version, there or in "
        f"{archive}-*; "
        f"found {present}. Nearest: {nearest}"
    )


def _read_binary(path: Path, hundred: bool) -> tuple[np.ndarray, np.ndarray]:
    record = PIXELS + (2 if hundred else 1)  # CIFAR-100 has a coarse label before the fine one
    size = path.stat().st_size
    if size == 0 or size % record:
        raise ValueError(
            f"{path}: {size} bytes is no whole number of {record}-byte records; truncated download?"
        )
    rows = np.fromfile(path, dtype=np.uint8).reshape(-1, record)
    return rows[:, -PIXELS:], rows[:, -PIXELS - 1]


def _read_python(path: Path, hundred: bool) -> tuple[np.ndarray, np.ndarray]:
    key = b"fine_labels" if hundred else b"labels"
    with path.open("rb") as file:
        try:
            content = _OnlyArrays(file, encoding="bytes").load()
        except (pickle.UnpicklingError, EOFError, ValueError, IndexError) as error:
            raise ValueError(
                f"{path}: expected a pickled dict of the CIFAR Python version: {error}"
            ) from error
    if not isinstance(content, dict) or b"data" not in content or key not in content:
        keys = list(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected keys b'data' and {key!r}, got {keys}")
    data = np.asarray(content[b"data"])
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS or len(data) != len(content[key]):
        raise ValueError(
            f"{path}: expected uint8 data of shape (N, {PIXELS}) and N labels, got {data.dtype} {data.shape}"
        )
    return data, np.asarray(content[key])


class _OnlyArrays(pickle.Unpickler):
    """A pickle can run any code; the published files need numpy's array constructor and nothing else."""

    _ALLOWED: ClassVar[set[tuple[str, str]]] = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def __init__(self, file: BinaryIO, **options: Any) -> None:
        super().__init__(file, **options)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")
        return super().find_class(module, name)


def idx(name: str, folder: Path) -> Images:
    """MNIST or Fashion-MNIST: 60,000 and 10,000 images of 28x28 pixels in four IDX files."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data-dir: {folder} is {'a file' if folder.exists() else 'not there'}; expected a folder"
        )
    parts = []
    for part in ("train", "t10k"):
        pixels = _read_idx(_idx_file(name, folder, f"{part}-images", 3), 3)
        labels = _read_idx(_idx_file(name, folder, f"{part}-labels", 1), 1)
        if len(pixels) != len(labels):
            raise ValueError(f"{folder}: {len(pixels)} {part} images and {len(labels)} labels")
        if len(labels) and int(labels.max()) > 9:
            raise ValueError(f"{folder}: label {int(labels.max())} does not exist in {name}")
        parts += [torch.from_numpy(pixels)[:, None].float() / 255, torch.from_numpy(labels).long()]
    return _normalised(name, 10, *parts, augment=False)


def _idx_file(name: str, folder: Path, stem: str, rank: int) -> Path:
    """The file under any of its usual names."""
    names = [f"{stem}{dot}idx{rank}-ubyte{packed}" for dot in "-." for packed in ("", ".gz")]
    found = next((folder / file for file in names if (folder / file).is_file()), None)
    if found is None:
        present = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"data-dir: {folder} does not hold {name}: expected {names[0]} (or .gz); found {present}"
        )
    return found


def _read_idx(path: Path, rank: int) -> np.ndarray:
    """The bytes of an IDX file: two zeros, the type (8: unsigned bytes), the rank, the sizes, the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be unpacked: {error}; truncated download?") from error
    header = 4 + 4 * rank
    if len(content) < header or content[:4] != bytes([0, 0, 8, rank]):
        raise ValueError(
            f"{path}: expected an IDX file of unsigned bytes in {rank} dimensions, got the bytes {content[:4].hex()}"
        )
    sizes = struct.unpack(f">{rank}I", content[4:header])
    if len(content) - header != math.prod(sizes):
        raise ValueError(
            f"{path}: {len(content) - header} bytes, expected {math.prod(sizes)} for {sizes}; truncated?"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(sizes).copy()


def _normalised(
    name: str, classes: int, train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, augment: bool
) -> Images:
    mean, std = train_x.mean((0, 2, 3), keepdim=True), train_x.std((0, 2, 3), keepdim=True)
    return Images(name, classes, (train_x - mean) / std, train_y, (test_x - mean) / std, test_y, augment)


def batches(
    x: Tensor, y: Tensor, size: int, generator: torch.Generator | None = None, augment: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mini-batches, shuffled (and augmented) by ``generator``, in order without one. The last one may be
    smaller."""
    order = torch.arange(len(x)) if generator is None else torch.randperm(len(x), generator=generator)
    for chosen in order.split(size):
        images = x[chosen]
        yield (_augmented(images, generator) if augment and generator is not None else images), y[chosen]


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Zero-pad by 4, take a random crop, mirror half of the images."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count), generator=generator)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = left[:, None] + torch.arange(width)
    mirrored = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)[:, None, None, :]
    return padded[
        torch.arange(count)[:, None, None, None],
        torch.arange(images.shape[1])[None, :, None, None],
        rows,
        columns,
    ]
