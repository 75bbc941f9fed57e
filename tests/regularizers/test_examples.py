"""`examples/train.py --method ... --budget ...` ends with a smaller network, and MNIST's files are read."""

from __future__ import annotations

import csv
import gzip
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ffr_ext import CompactionPlan

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

pytest.importorskip("sklearn", reason="the examples need ffr-ext[demo]")
pytest.importorskip("matplotlib", reason="the examples need ffr-ext[demo]")
pytest.importorskip("rich", reason="the examples need ffr-ext[demo]")

import train
from common import data, methods, models

SMALL: dict[str, Any] = {"model": "resnet8", "backend": "reference", "threads": 1, "budget": 0.6, "epochs": 3}


@pytest.fixture(scope="module")
def images() -> data.Images:
    """A part of the digits: the tests look at what is cut, not at how well it learns."""
    images = data.load("digits")
    images.train_x, images.train_y = images.train_x[:512], images.train_y[:512]
    return images


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_ends_with_a_smaller_network(
    method: str, tmp_path: Path, images: data.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "load", lambda *_: images)
    arguments = {**SMALL, "method": method, "rounds": 2, "out": tmp_path}
    run = train.main([text for k, v in arguments.items() for text in (f"--{k}", str(v))])
    with (tmp_path / "history.csv").open(newline="") as file:
        history = list(csv.DictReader(file))
    assert float(history[-1]["flops"]) <= 0.6
    assert (float(history[0]["penalty"]) > 0) == (method not in ("none", "stress"))
    assert float(history[-1]["penalty"]) == 0  # the last epochs are without
    fresh = models.build("resnet8", 10, 1)
    for number in range(1, len(run.plans) + 1):
        CompactionPlan.load(tmp_path / f"plan-{number}.json").apply(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "compact.pt"))
    assert run.accuracy(fresh) == pytest.approx(float(history[-1]["test_accuracy"]))
    assert run.accuracy(fresh) > 0.15


@pytest.mark.parametrize("method", ["stress", "sgl-l0", "ffr+slimming", "ffr+group-lasso"])
def test_a_run_with_a_budget_resumes_bit_for_bit(method: str, tmp_path: Path, images: data.Images) -> None:
    """From before the cut, and from behind it."""
    config = train.Config(**{**SMALL, "method": method, "rounds": 1})
    whole = train.Run(config, images)
    for until in (1, 2):
        whole.train(until=until)
        whole.save(tmp_path / f"{until}.pt")
    whole.train()
    truth = whole.model.state_dict()
    for until in (1, 2):
        resumed = train.Run.resume(tmp_path / f"{until}.pt", images)
        resumed.train()
        assert [p.digest() for p in resumed.plans] == [p.digest() for p in whole.plans]
        ours = resumed.model.state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in truth.items())


def test_settings_that_make_no_sense_end_with_one_sentence() -> None:
    for arguments, message in (
        (["--budget", "1.5"], "budget: expected a share of the FLOPs"),
        (["--rounds", "0"], "rounds: expected at least 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            train.main(arguments)
    with pytest.raises(ValueError, match="method: expected one of ffr"):
        train.Config(method="magic")


def test_lenet_has_the_published_size() -> None:
    model = models.build("lenet5", 10, 1)
    assert sum(p.numel() for p in model.parameters()) == 431_080
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


# --- IDX files -------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, packed: bool = False, dot: str = "-") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = None
    for part, count in (("train", 6), ("t10k", 3)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        first = first or (pixels, labels)
        end = ".gz" if packed else ""
        write_idx(folder / f"{part}-images{dot}idx3-ubyte{end}", pixels)
        write_idx(folder / f"{part}-labels{dot}idx1-ubyte{end}", labels)
    assert first is not None
    return first


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize(("packed", "dot"), [(False, "-"), (True, "-"), (False, ".")])
def test_idx_files_are_read(tmp_path: Path, name: str, packed: bool, dot: str) -> None:
    pixels, labels = write_mnist(tmp_path, packed, dot)
    images = data.load(name, tmp_path)
    assert images.train_x.shape == (6, 1, 28, 28)
    assert images.test_x.shape == (3, 1, 28, 28)
    assert images.train_y.tolist() == labels.tolist()
    assert not images.augment
    raw = torch.from_numpy(pixels.astype(np.float32)) / 255
    torch.testing.assert_close(images.train_x[:, 0], (raw - raw.mean()) / raw.std())


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        ("no folder", FileNotFoundError, "not there; expected a folder"),
        ("missing", FileNotFoundError, "expected t10k-labels-idx1-ubyte.*found t10k-images"),
        ("short", ValueError, "bytes, expected 4704 for .*truncated"),
        ("other type", ValueError, "expected an IDX file of unsigned bytes in 3 dimensions"),
        ("label", ValueError, "label 77 does not exist in mnist"),
        ("packed badly", ValueError, "cannot be unpacked"),
        ("count", ValueError, "6 train images and 5 labels"),
    ],
)
def test_damaged_idx_files_are_named(
    tmp_path: Path, damage: str, error: type[Exception], message: str
) -> None:
    write_mnist(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    folder = tmp_path
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "missing":
        (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    elif damage == "short":
        images.write_bytes(images.read_bytes()[:-10])
    elif damage == "other type":
        images.write_bytes(bytes([0, 0, 13, 3]) + images.read_bytes()[4:])
    elif damage == "label":
        write_idx(labels, np.full(6, 77, dtype=np.uint8))
    elif damage == "packed badly":
        packed = gzip.compress(images.read_bytes())
        images.with_suffix(".gz").write_bytes(packed[: len(packed) // 2])
        images.unlink()
        images.with_suffix(".gz").rename(tmp_path / "train-images-idx3-ubyte.gz")
    else:
        write_idx(labels, np.zeros(5, dtype=np.uint8))
    with pytest.raises(error, match=message):
        data.load("mnist", folder)


def test_data_without_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="mnist needs the folder of its files"):
        data.load("mnist")
    with pytest.raises(ValueError, match="data: expected one of digits"):
        data.load("svhn")
