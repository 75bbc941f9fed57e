"""`CompactionPlan`: the way from a compact checkpoint back to a model, in another process, on every rank, or
not at all."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pruning_models
import pytest
import torch
from pruning_models import Residual, X, absorbing, dead, difference, fingerprint
from pruning_nets import constant_behind_padding
from torch import nn

from ffr_ext import CompactionPlan, compact


def fresh_like(model: nn.Module) -> nn.Module:
    """The same classes and shapes with other values."""
    other = copy.deepcopy(model)
    for tensor in other.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    return other


@pytest.mark.parametrize("make", [dead, absorbing], ids=["residual", "absorbing"])
def test_a_fresh_model_loads_the_compact_checkpoint(make: Any, tmp_path: Path) -> None:
    model = make()
    result = compact(model, torch.randn(X), measure=False)
    assert not result.plan.is_empty
    result.plan.save(tmp_path / "plan.json")
    torch.save(result.model.state_dict(), tmp_path / "weights.pt")
    plan = CompactionPlan.load(tmp_path / "plan.json")
    assert plan.digest() == result.plan.digest()
    fresh = plan.apply(fresh_like(model))
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert difference(result.model, fresh) == 0


def test_the_plan_applied_to_the_source_is_the_result() -> None:
    """Bit for bit: absorbed constants are in the plan."""
    model = absorbing()
    result = compact(model, torch.randn(X), measure=False)
    assert result.plan.biases
    assert difference(result.plan.apply(copy.deepcopy(model)), result.model) == 0


PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from pruning_models import Residual
from ffr_ext import CompactionPlan
folder = sys.argv[1]
model = CompactionPlan.load(folder + "/plan.json").apply(Residual())
model.load_state_dict(torch.load(folder + "/weights.pt", weights_only=True))
with torch.no_grad():
    torch.save(model.eval()(torch.load(folder + "/x.pt", weights_only=True)), folder + "/y.pt")
"""


def test_another_process_gives_equal_bits(tmp_path: Path) -> None:
    model = dead()
    with torch.no_grad():
        model.blocks[1].bn2.weight.zero_()
        model.blocks[1].bn2.bias.zero_()
    x = torch.randn(X)
    result = compact(model, x, measure=False)
    assert isinstance(result.model.blocks[1], nn.Identity)
    result.plan.save(tmp_path / "plan.json")
    torch.save(result.model.state_dict(), tmp_path / "weights.pt")
    torch.save(x, tmp_path / "x.pt")
    subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path), str(Path(pruning_models.__file__).parent)],
        check=True,
        timeout=300,
    )
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), result.model(x))


def test_the_file_is_readable_without_ffr_ext(tmp_path: Path) -> None:
    compact(dead(), torch.randn(X), measure=False).plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    assert (data["format"], data["version"]) == ("ffr_ext.compaction_plan", 1)
    assert data["cuts"]["blocks.0.conv1.weight"] == [{"dim": 0, "keep": [5, 6, 7, 8, 9, 10, 11]}]
    assert data["attributes"]["blocks.0.conv1"] == {"out_channels": 7}
    assert data["source"]["blocks.0.conv1.weight"] == [12, 8, 3, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"], "no temporary file is left"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "not JSON"),
        (lambda text: "[]", "not a compaction plan"),
        (lambda text: text.replace('"version": 1', '"version": 99'), "version 99"),
        (lambda text: text.replace('"cuts"', '"cats"'), "damaged.*cuts"),
        (lambda text: text.replace('"out_channels": 7', '"out_channels": 9'), "checksum"),
        (lambda text: text.replace('"dim": 0', '"dim": "x"', 1), "damaged"),
    ],
    ids=["half", "other-json", "version", "missing", "altered", "type"],
)
def test_damaged_files(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    compact(dead(), torch.randn(X), measure=False).plan.save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        CompactionPlan.load(path)


@pytest.mark.parametrize("path", [3, None, {}], ids=["number", "none", "dict"])
def test_a_plan_is_saved_to_and_loaded_from_a_file_name(path: Any) -> None:
    """A number is none: `open` would take it for a file that is open already, and close it."""
    with pytest.raises(
        TypeError, match=f"expected str, bytes or os.PathLike object, not {type(path).__name__}"
    ):
        CompactionPlan.load(path)
    with pytest.raises(
        TypeError, match=f"expected str, bytes or os.PathLike object, not {type(path).__name__}"
    ):
        CompactionPlan({}).save(path)


class Named:
    """A path of the kind that gives bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> bytes:
        return os.fsencode(self.path)


@pytest.mark.parametrize("kind", [str, Path, os.fsencode, Named], ids=["str", "Path", "bytes", "PathLike"])
def test_a_file_name_is_of_any_kind(kind: Any, tmp_path: Path) -> None:
    plan = compact(dead(), torch.randn(X), measure=False).plan
    path = tmp_path / "plan.json"
    plan.save(kind(path))
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert CompactionPlan.load(kind(path)) == plan
    path.write_text("[]")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: not a compaction plan"):
        CompactionPlan.load(kind(path))


def test_a_file_name_is_no_plan() -> None:
    with pytest.raises(TypeError, match=r"source: .*got str; CompactionPlan\.load\(path\)"):
        CompactionPlan("plan.json")  # type: ignore[arg-type]


def test_what_is_no_optimizer_changes_nothing() -> None:
    plan, model = compact(dead(), torch.randn(X), measure=False).plan, dead()
    before = fingerprint(model)
    with pytest.raises(TypeError, match=r"optimizer: expected the torch\.optim\.Optimizer.*got str"):
        plan.apply(model, "adam")  # type: ignore[arg-type]
    assert fingerprint(model) == before


def with_cuts(plan: CompactionPlan, **changes: Any) -> CompactionPlan:
    return CompactionPlan(**{**{f: getattr(plan, f) for f in plan.__dataclass_fields__}, **changes})


@pytest.mark.parametrize(
    "case", ["wider", "other", "narrower-already", "indices", "dimension", "attribute", "ddp"]
)
def test_a_plan_that_does_not_fit_changes_nothing(case: str) -> None:
    from ffr_ext.pruning.surgery.cuts import Cut

    plan = compact(dead(), torch.randn(X), measure=False).plan
    model: nn.Module = dead()
    if case == "wider":
        model = Residual(width=16)
    elif case == "other":
        model = constant_behind_padding()
    elif case == "narrower-already":
        plan.apply(model)
    elif case == "indices":
        plan = with_cuts(plan, cuts={"blocks.0.conv1.weight": [Cut(0, [0, 0, 1])]})
    elif case == "dimension":
        plan = with_cuts(plan, cuts={"head.bias": [Cut(3, [0])]})
    elif case == "attribute":
        plan = with_cuts(plan, attributes={"head": {"out_chanels": 3}})
    elif case == "ddp":
        model = nn.DataParallel(model)
    before, shapes = fingerprint(model), [tuple(p.shape) for p in model.parameters()]
    with pytest.raises(ValueError, match=r"another model|damaged|wrapped"):
        plan.apply(model)
    assert fingerprint(model) == before
    assert [tuple(p.shape) for p in model.parameters()] == shapes


# ---------------------------------------------------------------------------------------------------
# Several ranks
# ---------------------------------------------------------------------------------------------------


def rank_main(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    outcome: dict[str, Any] = {}
    try:
        model = dead()
        with torch.no_grad():
            for tensor in model.state_dict().values():
                torch.distributed.broadcast(tensor, 0)
        torch.manual_seed(100 + rank)  # every rank has its own data
        try:
            compact(nn.parallel.DistributedDataParallel(copy.deepcopy(model)), torch.randn(X))
        except ValueError as error:
            outcome["wrapped"] = str(error)
        result = compact(model, torch.randn(X), measure=False)
        outcome["digest"] = result.plan.digest()
        wrapped = nn.parallel.DistributedDataParallel(result.model.train())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            wrapped(torch.randn(X)).square().mean().backward()
            optimizer.step()
        outcome["weight"] = float(sum(p.double().sum() for p in wrapped.parameters()))
        try:
            compact(dead(filters=4 + rank), torch.randn(X), measure=False)
        except RuntimeError as error:
            outcome["other weights"] = str(error)
        try:
            compact(dead(), torch.randn(X) if rank else "not an input")
        except (RuntimeError, TypeError) as error:
            outcome["one rank fails"] = str(error)
    finally:
        Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
        torch.distributed.barrier()  # a rank that leaves early aborts the other
        torch.distributed.destroy_process_group()


def test_ranks_agree_or_all_raise(tmp_path: Path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    torch.multiprocessing.spawn(rank_main, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert "DistributedDataParallel" in first["wrapped"]
    assert "model.module" in first["wrapped"]
    assert first["digest"] == second["digest"]
    assert first["weight"] == second["weight"], "three steps keep the ranks in sync"
    assert "do not agree" in first["other weights"]
    assert first["other weights"] == second["other weights"]
    assert "expected a tensor" in first["one rank fails"]
    assert "do not agree" in second["one rank fails"]
