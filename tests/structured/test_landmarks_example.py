"""The landmarks example: the synthetic task shows the effect, and the table is made from a file of faces."""

from __future__ import annotations

import csv
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="the example draws with ffr-ext[demo]")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import landmarks

FACES = os.environ.get("FFR_EXT_FACES")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_few_noisy_pairs_and_many_labels_the_output_task_keeps_predictions_in_the_subspace_of_labels(
    seed: int,
) -> None:
    without, with_task = (landmarks.subspace(seed, weight, steps=1000) for weight in (0.0, 10.0))
    assert with_task.outside < 0.3 < without.outside
    assert with_task.error < without.error


def test_the_synthetic_task_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    results = landmarks.main(["--seeds", "0", "--steps", "50"])
    assert list(results) == [0, 1, 10]
    assert "test error / variance" in capsys.readouterr().out


def write_faces(path: Path) -> None:
    """Faces of one shape at random places and sizes, drawn as dots."""
    rng = np.random.default_rng(0)
    shape = rng.uniform(-0.5, 0.5, (68, 2))
    shape[36], shape[45] = (-0.3, -0.2), (0.3, -0.2)
    splits = ["helen_train"] * 60 + ["helen_test"] * 10 + ["afw"] * 10
    points = shape * rng.uniform(0.8, 1.2, (80, 1, 1)) + rng.uniform(-0.3, 0.3, (80, 1, 2))
    pixels = np.zeros((80, 50, 50), np.uint8)
    columns = ((points + 1) * 24.5).round().astype(int).clip(0, 49)
    for image, face in zip(pixels, columns, strict=True):
        image[face[:, 1], face[:, 0]] = 255
    boxes = np.tile(np.array([0, 0, 100, 100], np.int32), (80, 1))
    names = {"x": pixels, "y": points.astype(np.float32), "box": boxes}
    np.savez(path, split=np.array(splits), **names, **{f"{k}_tight": v for k, v in names.items()})


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(landmarks, "TRAINING", 50)
    monkeypatch.setattr(landmarks, "VALIDATION", 10)
    rows = {
        name: dataclasses.replace(row, faces=min(row.faces, 20), steps=20)
        for name, row in landmarks.ROWS.items()
    }
    monkeypatch.setattr(landmarks, "ROWS", rows)
    write_faces(tmp_path / "faces.npz")
    return tmp_path


def test_every_row_of_the_table_is_made_from_a_file_of_faces(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    landmarks.main(
        ["--faces", str(tiny / "faces.npz"), "--rows", "all", "--out", str(tiny / "out" / "runs.csv")]
    )
    with (tiny / "out" / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert [(run["row"], run["task"]) for run in runs] == [
        (name, task) for name in landmarks.ROWS for task in ("without", "with")
    ]
    assert all(0 < float(run["nrmse"]) < 2 and 0 <= float(run["auc"]) <= 100 for run in runs)
    text = capsys.readouterr().out
    assert text.count("| 1 |") == len(landmarks.ROWS)
    assert "mean shape, tight box" in text
    table = text[text.index("| setting") :].strip()
    landmarks.main(["--runs", str(tiny / "out" / "runs.csv"), "--draw", str(tiny / "runs.svg")])
    assert capsys.readouterr().out.strip() == table
    assert (tiny / "runs.svg").stat().st_size > 5000


def test_the_task_changes_the_net_and_is_switched_off_without_it(tiny: Path) -> None:
    setting = dataclasses.replace(landmarks.ROWS["sgd-100"], steps=100)
    scores = [
        landmarks.train(tiny / "faces.npz", setting, 0, with_task) for with_task in (False, False, True)
    ]
    assert scores[0] == scores[1] != scores[2]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--faces: no file .*none\.npz"):
        landmarks.main(["--faces", str(tmp_path / "none.npz")])


@pytest.mark.slow
@pytest.mark.skipif(
    FACES is None, reason="set FFR_EXT_FACES to the file that examples/landmarks.py describes"
)
def test_the_faces_give_the_published_mean_shape_and_a_gain_with_slow_training() -> None:
    path = Path(str(FACES))
    assert landmarks.mean_shape(path).auc == pytest.approx(64.5, abs=0.5)
    runs = landmarks.table(path, ["sgd-800"], [0, 1])
    cdf = {task: sum(run["cdf"] for run in runs if run["task"] == task) / 2 for task in ("without", "with")}
    assert cdf["with"] > cdf["without"] + 2
