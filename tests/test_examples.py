"""The example scripts, at settings that take seconds: what they compute, write, and say about wrong input."""

from __future__ import annotations

import csv
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ffr_ext import CompactionPlan

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

pytest.importorskip("sklearn", reason="the examples need ffr-ext[demo]")
pytest.importorskip("matplotlib", reason="the examples need ffr-ext[demo]")
pytest.importorskip("rich", reason="the examples need ffr-ext[demo]")

import demo  # noqa: E402
import sweep  # noqa: E402
import train  # noqa: E402
from common import data, filters, models  # noqa: E402

TINY = {"model": "resnet8", "backend": "reference", "threads": 1}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def options(**chosen: Any) -> list[str]:
    return [
        text
        for key, value in {**TINY, **chosen}.items()
        for text in (f"--{key.replace('_', '-')}", str(value))
    ]


# --- networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "features"),
    [
        # He et al. 2016, table 6: 0.27 M, 0.85 M, 1.7 M parameters.
        pytest.param("resnet20", 0.27e6, 10, id="resnet20"),
        pytest.param("resnet56", 0.85e6, 28, id="resnet56"),
        pytest.param("resnet110", 1.7e6, 55, id="resnet110"),
        # Simonyan and Zisserman's convolutions, 14.7 M, and one linear layer.
        pytest.param("vgg16_bn", 14.7e6, 13, id="vgg16_bn"),
    ],
)
def test_networks_have_the_published_size_and_the_documented_features(
    name: str, parameters: float, features: int
) -> None:
    model = models.build(name, classes=10, channels=3)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)
    assert len(models.flow_layers(model)) == features


@pytest.mark.parametrize("name", ["resnet8", "vgg16_bn"])
def test_networks_take_digits_and_cifar_sizes(name: str) -> None:
    model = models.build(name, classes=7, channels=1).eval()
    for size in (8, 32):
        assert model(torch.randn(2, 1, size, size)).shape == (2, 7)


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="resnet20"):
        models.build("resnet21", 10, 3)
    with pytest.raises(ValueError, match=r"6 n \+ 2"):
        models.ResNet(21, 10)


# --- data -----------------------------------------------------------------------------------------


def test_digits_are_split_once_and_normalised() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert first.train_x.shape == (1437, 1, 8, 8)
    assert first.test_x.shape == (360, 1, 8, 8)
    assert torch.equal(first.test_y, second.test_y)
    assert abs(float(first.train_x.mean())) < 1e-4
    assert not first.augment


def write_cifar(folder: Path, name: str, kind: str, images: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """A miniature of the published archives; returns the pixels and labels of the first training file."""
    rng = np.random.default_rng(0)
    hundred = name == "cifar100"
    files = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    first = None
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        pixels = rng.integers(0, 256, (images, 3072), dtype=np.uint8)
        labels = rng.integers(0, 100 if hundred else 10, images, dtype=np.uint8)
        first = first or (pixels, labels)
        if kind == "binary":
            coarse = [np.zeros((images, 1), np.uint8)] if hundred else []
            np.concatenate([*coarse, labels[:, None], pixels], axis=1).tofile(folder / f"{file}.bin")
        else:
            key = b"fine_labels" if hundred else b"labels"
            (folder / file).write_bytes(pickle.dumps({b"data": pixels, key: labels.tolist()}, protocol=2))
    assert first is not None
    return first


@pytest.mark.parametrize("nested", [False, True], ids=["the folder itself", "its parent"])
@pytest.mark.parametrize("kind", ["binary", "python"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_in_both_published_formats(tmp_path: Path, name: str, kind: str, nested: bool) -> None:
    folder = (
        tmp_path / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
        if nested
        else tmp_path
    )
    pixels, labels = write_cifar(folder, name, kind)
    images = data.load(name, tmp_path)
    assert images.train_x.shape == (4 if name == "cifar100" else 20, 3, 32, 32)
    assert images.test_x.shape == (4, 3, 32, 32)
    assert images.train_y[:4].tolist() == labels.tolist()
    # Channel planes of 1024 bytes, row by row; normalisation is one shift and one scale a channel.
    red = torch.from_numpy(pixels[0, :1024].astype(np.float32)).view(32, 32)
    got = images.train_x[0, 0]
    torch.testing.assert_close(
        (got - got.mean()) / got.std(), (red - red.mean()) / red.std(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        pytest.param(None, FileNotFoundError, "not there; expected a folder", id="no folder"),
        pytest.param(
            "empty", FileNotFoundError, "Expected.*data_batch_1.bin.*found nothing", id="empty folder"
        ),
        pytest.param("missing", FileNotFoundError, r"lacks data_batch_3\.bin", id="one file missing"),
        pytest.param("truncated", ValueError, "no whole number of 3073-byte records", id="truncated file"),
        pytest.param("label", ValueError, "label 200 does not exist in cifar10", id="another data set"),
        pytest.param(
            "pickle",
            ValueError,
            "os.system.* is not allowed|posix.system is not allowed",
            id="code in a pickle",
        ),
        pytest.param("keys", ValueError, "expected keys b'data' and b'labels'", id="another pickle"),
        pytest.param("garbage", ValueError, "expected a pickled dict", id="no pickle"),
    ],
)
def test_a_wrong_cifar_folder_says_what_was_expected(
    tmp_path: Path, damage: Any, error: Any, message: str
) -> None:
    folder = tmp_path / "cifar"
    if damage:
        folder.mkdir()
    if damage in ("missing", "truncated", "label"):
        write_cifar(folder, "cifar10", "binary")
        file = folder / "data_batch_3.bin"
        content = file.read_bytes()
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(content[:-1] if damage == "truncated" else bytes([200]) + content[1:])
    elif damage in ("pickle", "keys", "garbage"):
        write_cifar(folder, "cifar10", "python")
        content = {
            "pickle": b"cos\nsystem\n(S'true'\ntR.",
            "keys": pickle.dumps({b"a": 1}),
            "garbage": b"\x80garbage",
        }
        (folder / "data_batch_1").write_bytes(content[damage])
    with pytest.raises(error, match=message):
        data.load("cifar10", folder)


def test_data_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="digits, cifar10, cifar100, mnist"):
        data.load("imagenet")
    with pytest.raises(ValueError, match="needs the folder"):
        data.load("cifar10")


def test_augmentation_is_a_crop_of_the_padded_or_mirrored_image() -> None:
    images = torch.arange(1.0, 65).view(1, 1, 8, 8).repeat(64, 1, 1, 1)
    padded = torch.nn.functional.pad(images[0, 0], (4, 4, 4, 4))
    crops = padded.unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 8, 8)
    allowed = torch.cat([crops, crops.flip(2)])
    (batch, _), *_ = data.batches(images, torch.zeros(64), 64, torch.Generator().manual_seed(0), augment=True)
    for image in batch[:, 0]:
        assert (allowed == image).all((1, 2)).any()
    assert len({tuple(image.flatten().tolist()) for image in batch}) > 20


# --- dead filters ---------------------------------------------------------------------------------


def test_dead_filters_are_counted_and_cut_out() -> None:
    model = models.build("resnet8", 10, 1).eval()
    block = model.stages[1][0]
    block.norm1.weight.data.fill_(1)
    block.norm1.weight.data[0] = 5e-3  # small gamma
    block.norm1.running_var[1] = 1e-10  # hardly varies: sqrt(1e-10 / (1e-10 + 1e-5)) = 3e-3
    block.norm1.running_var[2] = 1e-6  # 0.3: alive
    images = torch.randn(4, 1, 8, 8)
    before = model(images)
    pruned = filters.prune(model, images)
    assert torch.equal(model(images), before)
    assert {layer.name: layer.zero_filters for layer in pruned.filters if layer.zero_filters} == {
        "stages.1.0.conv1": 2
    }
    assert (pruned.dead, pruned.total) == (2, 240)
    assert pruned.zero_weights == 2 * 16 * 9
    smaller = pruned.compaction.model
    assert smaller.stages[1][0].conv1.out_channels == 30
    torch.testing.assert_close(smaller(images), pruned.zeroed(images))


# --- training -------------------------------------------------------------------------------------


def test_training_writes_its_logs(tmp_path: Path) -> None:
    run = train.main(options(epochs=2, out=tmp_path))
    history = read(tmp_path / "history.csv")
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert float(history[1]["penalty"]) > 0
    assert float(history[1]["loss"]) < float(history[0]["loss"])
    # Features of ResNet-8: 2 + 1 + 1, so one length and no curvature.
    assert {(row["kind"], row["term"]) for row in read(tmp_path / "terms.csv")} == {("length", "0")}
    assert sum(int(row["filters"]) for row in read(tmp_path / "filters.csv")) == run.history[-1].filters


def test_the_penalty_is_off_when_both_weights_are_zero_and_takes_effect_otherwise(tmp_path: Path) -> None:
    off = train.main(options(epochs=1, method="ffr", ffr_gradient=0, ffr_curvature=0, out=tmp_path / "off"))
    on = train.main(
        options(epochs=1, method="ffr", ffr_gradient=30, ffr_curvature=0, norm="l2", out=tmp_path / "on")
    )
    assert off.history[0].penalty == 0
    assert on.history[0].penalty > 0
    assert on.terms[0]["value"] < off.terms[0]["value"]  # the flow got shorter


def test_resuming_gives_bit_for_bit_the_uninterrupted_run(tmp_path: Path) -> None:
    config = train.Config(epochs=3, model="resnet8", backend="reference", threads=1)
    images = data.load("digits")
    images.augment = True  # the random crops must continue where they stopped, too
    whole = train.Run(config, images)
    whole.train()
    half = train.Run(config, images)
    half.train(until=1)
    half.save(tmp_path / "checkpoint.pt")
    torch.manual_seed(99)
    resumed = train.Run.resume(tmp_path / "checkpoint.pt", images)
    resumed.train()
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    strip = [{**vars(epoch), "seconds": 0} for epoch in whole.history]
    assert strip == [{**vars(epoch), "seconds": 0} for epoch in resumed.history]
    assert whole.terms == resumed.terms


def test_the_compacted_network_can_be_loaded_again(tmp_path: Path) -> None:
    run = train.main([*options(epochs=1, out=tmp_path), "--compact"])
    fresh = models.build("resnet8", 10, 1)
    CompactionPlan.load(tmp_path / "plan.json").apply(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "compact.pt"))
    assert run.accuracy(fresh) == pytest.approx(run.history[-1].test_accuracy)


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    losses = [train.main(options(epochs=1, seed=seed, out=tmp_path)).history[0].loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"data": "cifar10", "data_dir": "/nowhere"}, "/nowhere is not there; expected a folder"),
        ({"data": "cifar10"}, "needs the folder"),
        ({"resume": None}, "checkpoint.pt is not there"),
    ],
)
def test_a_wrong_path_ends_with_one_sentence(tmp_path: Path, chosen: dict[str, Any], message: str) -> None:
    arguments = options(out=tmp_path)
    for key, value in chosen.items():
        arguments += [f"--{key.replace('_', '-')}"] + ([value] if value else [])
    with pytest.raises(SystemExit, match=message):
        train.main(arguments)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="not a checkpoint written by this script"):
        train.Run.resume(tmp_path / "checkpoint.pt")


# --- demo and sweep -------------------------------------------------------------------------------


def test_the_demo_prints_the_table_and_draws_the_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = demo.main(options(epochs=2, out=tmp_path, model="resnet20"))
    text = capsys.readouterr().out
    for words in (
        "stages.2.2.conv2",
        "parameters that could go",
        "FLOPs that could go",
        "test accuracy",
        "688",
    ):
        assert words in text
    for name in ("filters_alive.png", "pruned.png", "flow_terms.png", "training.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert {row["run"] for row in read(tmp_path / "filters.csv")} == set(runs)
    # Both runs saw the same initial network and the same batches: only the penalty differs.
    penalties = [run.history[0].penalty for run in runs.values()]
    assert penalties[0] == 0
    assert all(penalty > 0 for penalty in penalties[1:])
    assert [run.config.method for run in runs.values()] == ["none", "ffr", "ffr+slimming"]


def test_a_sweep_skips_what_it_has_and_summarises_over_seeds(tmp_path: Path) -> None:
    arguments = [*options(out=tmp_path), "--weights", "0", "3", "--epochs", "1"]
    sweep.main([*arguments, "--seeds", "0"])
    before = read(tmp_path / "runs.csv")
    means = sweep.main([*arguments, "--seeds", "0", "1"])
    after = read(tmp_path / "runs.csv")
    assert after[:2] == before
    assert len(after) == 4
    assert [(entry["weight"], entry["seeds"]) for entry in means] == [(0, 2), (3, 2)]
    accuracies = [float(row["test_accuracy"]) for row in after if float(row["weight"]) == 3]
    assert means[1]["mean_test_accuracy"] == pytest.approx(sum(accuracies) / 2, abs=1e-4)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


# --- one script for each trainer ------------------------------------------------------------------


def test_the_plain_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    import plain_loop

    plain_loop.main(["--epochs", "2", "--model", "resnet8"])
    assert "1 gradient term," in capsys.readouterr().out


def test_the_lightning_example_runs_and_logs(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="needs ffr-ext[lightning]")
    import lightning_digits

    trainer = lightning_digits.main(["--epochs", "2", "--model", "resnet8", "--out", str(tmp_path)])
    assert float(trainer.callback_metrics["ffr/penalty"]) > 0
    assert float(trainer.callback_metrics["accuracy"]) > 0.3
    assert "ffr/length/0" in (tmp_path / "metrics.csv").read_text()


def test_the_hugging_face_example_runs_and_logs(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs ffr-ext[hf]")
    import huggingface_vit

    trainer = huggingface_vit.main(["--epochs", "1", "--out", str(tmp_path)])
    assert trainer.state.log_history[0]["ffr_penalty"] > 0


def test_the_accelerate_example_runs() -> None:
    pytest.importorskip("accelerate", reason="needs ffr-ext[hf]")
    import accelerate_loop

    assert accelerate_loop.main(["--epochs", "1", "--model", "resnet8"]) > 0.2


def test_the_ddp_example_runs_on_two_processes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLES / "ddp_loop.py"), "--epochs", "1", "--model", "resnet8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test accuracy") == 1
