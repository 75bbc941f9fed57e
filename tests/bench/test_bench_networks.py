"""What `compact` makes of networks of others: half of the channels are dead, and the table says what came."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.__main__ import main as benchmarks
from benchmarks.networks import libraries, main, protocol, zoo
from ffr_ext.pruning.scale import find_layers


class Small(nn.Module):
    """The second convolution has zeros at its border, so that its bias takes no constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.b, self.c = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.norm(self.a(x))).relu())


SMALL = zoo.Network("torch/small", "plain and dense", Small, lambda: torch.randn(1, 3, 8, 8))


def test_the_same_channels_are_dead_every_time_and_are_constants_or_zeros() -> None:
    models = [Small().eval() for _ in range(2)]
    for model, constants_too in zip(models, (False, True), strict=True):
        layers = find_layers(model, SMALL.inputs())
        protocol.randomize(model)
        protocol.kill(model, layers, constants_too)
    first, second = (model.norm.weight == 0 for model in models)
    assert torch.equal(first, second)
    assert 0 < int(first.sum()) < 16
    assert models[0].a.weight.any(), "behind a norm it is gamma alone"
    assert bool(models[0].norm.bias.all())
    assert torch.equal(models[1].norm.bias == 0, second)
    assert torch.equal(models[1].b.bias == 0, models[1].b.weight.flatten(1).any(1).logical_not())


def test_merging_is_what_the_columns_differ_by() -> None:
    outcome = protocol.run(SMALL)
    assert outcome.refused == ""
    assert outcome.without is not None
    assert outcome.merged is not None
    assert outcome.nothing_to_merge is not None
    assert outcome.parameters > outcome.without > outcome.merged > outcome.nothing_to_merge
    assert outcome.merged - outcome.nothing_to_merge < outcome.parameters / 16 + 50, "one channel carries all"
    assert outcome.exports == 1
    assert outcome.relative_error is not None
    assert outcome.relative_error < 1e-5
    assert "constant, not absorbed" in outcome.stays


def test_what_is_refused_says_why() -> None:
    class Branching(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if bool(x.sum() > 0) else x

    outcome = protocol.run(zoo.Network("torch/branching", "residual", Branching, SMALL.inputs))
    assert outcome.refused.startswith("torch.export could not trace Branching")
    assert outcome.merged is None


def test_a_missing_library_is_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zoo, "library", lambda name: __import__("no_such_library"))
    assert benchmarks(["networks", "timm/resnet18", "--out", str(tmp_path / "rows.csv")]) == 0
    assert "timm/resnet18: not measured, No module named 'no_such_library'" in capsys.readouterr().out
    assert not (tmp_path / "rows.csv").exists()


def test_rows_of_networks_that_are_not_measured_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "NETWORKS", {"torch/small": SMALL, "torch/other": SMALL})
    path = tmp_path / "rows.csv"
    main.write(path, [dict.fromkeys(main.COLUMNS, "") | {"network": "torch/other", "refused": "no"}])
    assert benchmarks(["networks", "torch/small", "--out", str(path)]) == 0
    rows = main.read(path)
    assert [row["network"] for row in rows] == ["torch/small", "torch/other"]
    benchmarks(["networks", "--table", "--out", str(path)])
    (line,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("| plain and dense")]
    assert line.split(" | ")[1] == "1"


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks(["networks", "timm/no_such_network"])
    assert "got timm/no_such_network" in capsys.readouterr().err


def test_the_page_shows_the_table_of_the_committed_rows() -> None:
    page = (main.ROOT / "docs" / "compaction.md").read_text(encoding="utf-8")
    assert main.table(main.read(main.RESULTS)) in page


def test_the_folder_is_looked_into_for_one_import_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is there must not be found by libraries that import torchvision where there is one."""
    (tmp_path / "a_library_of_networks.py").write_text("NAME = 'here'\n")
    monkeypatch.setattr(libraries, "FOLDER", tmp_path)
    before = list(sys.path)
    assert libraries.library("a_library_of_networks").NAME == "here"
    assert sys.path == before
    del sys.modules["a_library_of_networks"]
    with pytest.raises(ImportError):
        __import__("a_library_of_networks")
