"""The drawn flowers, the reader of the published ones, and both studies at settings that take seconds."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("matplotlib", reason="the examples need ffr-ext[demo]")

import flowers  # noqa: E402

from ffr_ext.explain import Selection, localization  # noqa: E402


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("variant", ["single", "double"])
def test_flowers_are_images_with_as_many_of_each_class_and_a_mask_of_the_telling_part(variant: str) -> None:
    images, labels, masks = flowers.flowers(48, variant, seed=1)
    assert images.shape == (48, 3, 64, 64)
    assert images.dtype == torch.float32
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    classes = len(flowers.class_names(variant))
    assert torch.bincount(labels).tolist() == [48 // classes] * classes
    share = masks.flatten(1).float().mean(1)
    assert 0.003 < float(share.min()) < float(share.max()) < 0.25
    # Under the mask lies the colour that the class is named for; shading scales it, noise blurs it.
    colours = torch.tensor(list(flowers.COLOURS.values()))
    for image, label, mask in zip(images, labels.tolist(), masks, strict=True):
        inside = image[:, mask].median(1).values
        alike = torch.nn.functional.cosine_similarity(inside[None], colours)
        assert int(alike.argmax()) == label % 6


def test_the_same_seed_draws_the_same_flowers() -> None:
    a, b, other = flowers.flowers(5, seed=3), flowers.flowers(5, seed=3), flowers.flowers(5, seed=4)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], other[0])
    for wrong in (dict(variant="triple"), dict(size=8), dict(distractors=-1)):
        with pytest.raises(ValueError, match="expected"):
            flowers.flowers(1, **wrong)


def test_colour_alone_finds_the_part_less_well_with_distractors() -> None:
    scores = []
    for distractors in (0, 3):
        images, _, masks = flowers.flowers(60, distractors=distractors, seed=0)
        odd = (images - images.mean((2, 3), keepdim=True)).norm(dim=1)
        scores.append(localization(odd, masks).iou)
    assert scores[1] < scores[0]


def tree(folder: Path, masks: bool = True) -> Path:
    """The layout of the published images: two folders, the same classes, the same order of files."""
    image = pytest.importorskip("PIL.Image")
    for name in ("class_a", "class_b"):
        for suffix in ("", "_MASK"):
            (folder / f"an8Flower_double_12c{suffix}" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.zeros((20, 20, 3), np.uint8)
            pixels[:, :, 0] = 100 + 20 * number
            image.fromarray(pixels).save(folder / "an8Flower_double_12c" / name / f"{number:04d}.png")
            pixels[:] = 0
            pixels[4 : 8 + number] = 255 if masks else 0
            image.fromarray(pixels).save(
                folder / "an8Flower_double_12c_MASK" / name / f"{number:04d}_mask.png"
            )
    return folder / "an8Flower_double_12c"


def test_the_published_folders_are_read_with_their_masks(tmp_path: Path) -> None:
    data = flowers.read_an8flower(tree(tmp_path), size=20)
    assert data.classes == ("class_a", "class_b")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.images.shape == (6, 3, 20, 20)
    assert data.images[:3, 0, 0, 0].mul(255).round().tolist() == [100, 120, 140]
    assert data.masks.sum((1, 2)).tolist() == [80, 100, 120] * 2
    assert flowers.read_an8flower(tmp_path / "an8Flower_double_12c", size=10).masks.shape == (6, 10, 10)


def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="an8Flower_double_12c_MASK"):
        flowers.read_an8flower(tmp_path / "an8Flower_double_12c")
    folder = tree(tmp_path)
    next((tmp_path / "an8Flower_double_12c_MASK" / "class_b").iterdir()).unlink()
    with pytest.raises(ValueError, match="class_b: 3 images and 2 masks"):
        flowers.read_an8flower(folder)
    with pytest.raises(ValueError, match=r"mask .* is empty"):
        flowers.read_an8flower(tree(tmp_path / "black", masks=False))


def test_the_study_writes_its_tables_and_pages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--seeds", "0", "--epochs", "2", "--train", "96", "--test", "24", "--out", str(tmp_path)]
    flowers.main(["--variants", "easy", *size])
    rows = {row["method"]: row for row in read(tmp_path / "methods.csv")}
    assert len(rows) == 11
    for row in rows.values():
        assert 0 <= float(row["auc"]) <= float(row["iou"]) <= float(row["iou_best"]) <= 1
    # Whatever the net has learned, the fix removes the grid and a constant map has none.
    assert float(rows["guided + stride fix, exact"]["grid"]) < 0.5 * float(
        rows["guided from the logit"]["grid"]
    )
    assert float(rows["everything"]["grid"]) == 0
    assert next(row["removed"] for row in read(tmp_path / "removal.csv")) == "nothing"
    assert len(read(tmp_path / "mu.csv")) == 5
    assert all(-1 <= float(row["correlation"]) <= 1 for row in read(tmp_path / "random.csv"))
    assert (tmp_path / "heat-easy.png").stat().st_size > 1000
    assert (tmp_path / "averages-easy.png").exists()
    assert Selection.load(tmp_path / "selection-easy.json").classes == flowers.class_names("single")
    assert "| |easy|" in capsys.readouterr().out


@pytest.mark.slow
def test_survivors_have_the_same_heat_before_and_after_compaction(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the examples need ffr-ext[demo]")
    pytest.importorskip("rich", reason="the examples need ffr-ext[demo]")
    import survivors

    options = ["--model", "resnet8", "--epochs", "1", "--weight", "300", "--backend", "reference"]
    rows = survivors.main([*options, "--out", str(tmp_path)])
    assert [row["run"] for row in rows] == [survivors.WITHOUT, survivors.WITH]
    for row in rows:
        assert row["largest_heat_change"] < 1e-3
        assert 0 < row["selected"] <= row["alive"] <= row["filters"] == 240
    of_layers = read(tmp_path / "survivors-layers.csv")
    assert sum(int(row["filters"]) for row in of_layers if row["run"] == survivors.WITHOUT) == 240
    assert (tmp_path / "digits-heat-with.png").exists()
