# ruff: noqa: E402  (the repository is put on the path first)
"""The benchmarks run, at a tiny size, and what they print agrees with what they measured."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # `benchmarks` is not part of the package: it lives in the repository alone

from benchmarks import processes
from benchmarks.__main__ import main as benchmarks_main
from benchmarks.harness import measure as harness
from benchmarks.harness.measure import QUICK, Options, Row, Subject
from benchmarks.harness.shapes import SETTINGS, make_features, shrink
from benchmarks.harness.truth import Truth
from benchmarks.reporting import results, scaling_law
from benchmarks.reporting import tables as report
from benchmarks.suites import first_call
from benchmarks.suites import loss as bench_loss
from benchmarks.suites import scaling as bench_scaling
from benchmarks.suites import step as bench_step
from ffr_ext import reference

WITHOUT_COMPILE = ("eager", "cpu")  # compiling takes seconds for every case


def row(**changes: object) -> Row:
    """A row with made-up numbers."""
    values: dict[str, object] = {
        "bench": "loss",
        "case": "resnet56x32",
        "provider": "eager",
        "mode": "both",
        "device": "cpu",
        "ms": 1.0,
        "ms_p20": 0.9,
        "ms_p80": 1.2,
        "host_ms": 1.0,
        "samples": 3,
        "bytes": 1_000_000,
        "gbps": 1.0,
        "copy_percent": 50.0,
        "peak_bytes": 2_000_000,
        "allocated_bytes": 3_000_000,
        "error": 1e-7,
        "config": {
            "setting": "resnet56",
            "batch": 32,
            "features": 28,
            "feature_bytes": 4_000_000,
            "dtype": "float32",
            "layout": "contiguous",
            "norm": "l1",
            "curvature_kind": "difference",
        },
    }
    return Row(**{**values, **changes})  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Every benchmark runs
# --------------------------------------------------------------------------------------------------


def test_runs_in_processes_of_their_own_are_merged_into_medians() -> None:
    runs = [
        [row(ms=ms, samples=2, error=error, peak_bytes=None), row(provider="cpu", ms=1.0)]
        for ms, error in ((5.0, 1e-7), (2.0, 3e-7), (3.0, 2e-7))
    ]
    eager, ours = processes.merged(runs)
    assert (eager.ms, eager.samples, eager.error, eager.peak_bytes) == (3.0, 6, 3e-7, None)
    assert eager.config["processes"] == 3
    assert eager.config["ms_of_processes"] == [5.0, 2.0, 3.0]
    assert report.of_processes(harness.as_dict(eager), harness.as_dict(ours)) == " (2.0 to 5.0)"
    assert report.of_processes(harness.as_dict(row()), harness.as_dict(row())) == ""


def test_what_a_configuration_measures_is_merged_too() -> None:
    added = (30.0, 10.0, 20.0)
    (merged,) = processes.merged([[row(config={"batch": 4, "added_time_percent": a})] for a in added])
    assert (merged.config["batch"], merged.config["added_time_percent"]) == (4, 20.0)
    assert merged.config["added_time_percent_of_processes"] == list(added)


def test_the_table_of_compiled_steps_tells_added_time_with_its_range_and_the_first_step() -> None:
    def step(provider: str, ms: float, added: list[float], first: float) -> dict[str, Any]:
        config = {"added_time_percent": added[0], "added_time_percent_of_processes": added}
        config = {**config, "first_step_seconds": first}
        return harness.as_dict(row(provider=provider, case="resnet20x32", mode="step", ms=ms, config=config))

    lines = report.compiled_step_table([
        step("none", 100.0, [0.0, 0.0, 0.0], 40.0), step("ffr_loss", 104.0, [2.5, 1.0, 4.0], 50.0),
    ])  # fmt: skip
    assert lines[-1] == "| resnet20x32 | 100 ms | +2.5 % (+1.0 to +4.0) | 40 / 50 |"
    assert report.compiled_step_table([]) == []


def test_a_benchmark_measures_in_fresh_processes(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--tiny", "loss", "--only", "tiny3", "--modes", "forward", "--providers", "eager"]
    assert benchmarks_main([*arguments, "--processes", "2"]) == 0
    printed = capfd.readouterr().out
    assert "# process 2 of 2" in printed
    assert printed.count(" eager ") == 3  # one line of each process, and the medians


@pytest.mark.parametrize("setting", [s.name for s in SETTINGS.values() if not s.gpu_only] + ["variants"])
def test_loss_benchmark_runs(setting: str) -> None:
    options = Options(
        only=[setting], providers=WITHOUT_COMPILE, modes=bench_loss.MODES, effort=QUICK, tiny=True
    )
    rows = bench_loss.main(options)
    providers = {*(p for p in bench_loss.providers_here("cpu") if p in WITHOUT_COMPILE), harness.COPY}
    assert {r.provider for r in rows} == providers
    assert {r.mode for r in rows} == set(bench_loss.MODES)
    for r in rows:
        assert 0 < r.ms_p20 <= r.ms <= r.ms_p80
        if r.provider != harness.COPY:
            # float16 gradients round to 11 bits; everything else is far better.
            assert r.error is not None
            assert r.error < (1e-2 if r.config["dtype"] in ("bfloat16", "float16") else 1e-5), r
            assert r.peak_bytes is not None
            assert r.allocated_bytes is not None
            assert 0 < r.peak_bytes <= r.allocated_bytes


@pytest.mark.slow
def test_loss_benchmark_compiles_its_peer() -> None:
    options = Options(only=["tiny3"], providers=["compile"], modes=["both"], effort=QUICK, tiny=True)
    errors = [r.error for r in bench_loss.main(options) if r.provider == "compile"]
    assert len(errors) == 1
    assert errors[0] is not None
    assert errors[0] < 1e-5


def test_results_go_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFR_RESULTS_DIR", str(tmp_path))
    assert results.write("loss", [row()], "cpu").parent == tmp_path


def test_scaling_benchmark_runs() -> None:
    rows = bench_scaling.main(Options(providers=WITHOUT_COMPILE, effort=QUICK, tiny=True))
    assert {r.bench for r in rows} == {"scaling"}
    assert {r.config["dtype"] for r in rows} == {"float32", "bfloat16"}


def test_step_benchmark_runs() -> None:
    providers = [p for p in bench_step.PROVIDERS if p != "compile"]
    rows = bench_step.main(Options(providers=providers, effort=QUICK, tiny=True))
    assert [r.provider for r in rows] == providers
    assert rows[0].config["added_time_percent"] == 0
    for r in rows:
        assert r.config["features"] == 4  # stem and three blocks
        assert max(held for _, held in r.config["timeline"]) == r.peak_bytes


def test_every_provider_trains_the_same_network() -> None:
    """What is timed is the same training: after a step the weights are the same, and others than without a
    penalty.
    """
    weights = {}
    for name in bench_step.PROVIDERS:
        if name != "compile":
            step = bench_step.Step(bench_step.TINY[0], name, "cpu")
            step.run()
            weights[name] = torch.cat([p.detach().flatten() for p in step.model.parameters()])
    for name in ("ffr_loss", "FeatureFlow"):
        torch.testing.assert_close(weights[name], weights["eager"])
    assert not torch.equal(weights["eager"], weights[bench_step.PLAIN])


def test_first_call_is_timed_in_a_process_of_its_own() -> None:
    rows = first_call.first_call_rows("tiny3", ["eager"], "cpu")
    assert [(r.provider, r.mode) for r in rows] == [("eager", "first")]
    assert rows[0].ms > 0


# --------------------------------------------------------------------------------------------------
# The harness measures what it says
# --------------------------------------------------------------------------------------------------


def test_peak_and_sum_of_allocations() -> None:
    """Two buffers one after the other, then two at once."""

    def run() -> torch.Tensor:
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        second = torch.empty(3000, dtype=torch.uint8)
        return second + 1

    memory = harness.memory_timeline(run, "cpu")
    # `second + 1` makes a scalar tensor on the way, of a few bytes.
    assert 6000 <= memory.peak < 6100
    assert 7000 <= memory.allocated < 7100


def test_memory_from_before_the_run_does_not_count_when_it_is_released() -> None:
    held = [torch.empty(1 << 20, dtype=torch.uint8)]

    def run() -> torch.Tensor:
        held.clear()
        return torch.empty(1000, dtype=torch.uint8)

    assert harness.memory_timeline(run, "cpu").peak == 1000


def test_percentiles() -> None:
    timing = harness.summarise([(float(i), float(i)) for i in (5, 1, 4, 2, 3, 6, 7, 8, 9, 10, 11)])
    assert (timing.median, timing.p20, timing.p80, timing.samples) == (6, 3, 9, 11)
    assert timing.times[:3] == (5, 1, 4)


def test_every_round_runs_every_provider_and_prepares_it() -> None:
    """Also that preparation is not timed: it sleeps longer than the whole run may take."""
    calls: list[str] = []

    def subject(name: str) -> Subject:
        return Subject(lambda: calls.append(name), lambda: (calls.append(name.upper()), time.sleep(0.05)))

    effort = harness.Effort(warmup=1, rounds=4, seconds=0.0)
    timings = harness.time_in_turns({"a": [subject("a")], "b": [subject("b")]}, torch.device("cpu"), effort)
    assert calls.count("a") == calls.count("b") == calls.count("A") == 4 + 2
    assert "".join(calls[-8:]).lower() in ("aabbbbaa", "bbaaaabb"), "the order changes from round to round"
    assert max(t.median for t in timings.values()) < 50


@pytest.mark.parametrize("norm", ["l1", "l2_squared", "l2"])
@pytest.mark.parametrize("kind", ["difference", "angle"])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_truth_in_chunks_is_the_reference_in_float64(
    norm: str, kind: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.harness.truth._CHUNK_ELEMENTS", 130)  # two chunks, the second smaller
    features = make_features([(3, 4, 2, 2)] * 3 + [(3, 6)] * 2, dtype=torch.float64)
    options = {
        "norm": norm,
        "curvature_kind": kind,
        "reduction": reduction,
        "gradient": 2.0,
        "curvature": 0.5,
    }
    loss = reference.ffr_loss(features, **options)  # type: ignore[arg-type]
    grads = torch.autograd.grad(loss, features)
    truth = Truth(features, options)
    assert len(truth.slices) == 2
    assert truth.error(loss, grads) < 1e-12
    assert truth.error(loss * (1 + 1e-3), grads) == pytest.approx(1e-3)
    wrong = [g.clone() for g in grads]
    wrong[2][2, 0] = torch.nan
    assert not truth.error(loss, wrong) < 1, "NaN never passes"


def test_bytes_that_must_move() -> None:
    """l1 in fp32: docs/design.md section 3 has 4 + 0.5 bytes forward and 0.5 + 4 backward an element; signs
    have one
    plane fewer than there are features."""
    case = bench_loss.Case(shrink(SETTINGS["resnet20"]), 8)
    elements = case.setting.elements(8)
    # Three stages of three features, of 8 x 4 x 4 x 4 elements: six planes of half a byte an element.
    assert elements == 9 * 512
    assert case.moved_bytes("forward") == 4 * elements + 6 * 256
    assert case.moved_bytes("both") == 2 * case.moved_bytes("forward")
    squared = bench_loss.Case(case.setting, 8, norm="l2_squared")
    assert squared.moved_bytes("both") == 12 * elements


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.name)
def test_settings(setting: object) -> None:
    """The bytes the issue asks for: above the last-level cache, above 2^31 in one feature."""
    above = SETTINGS["above_llc"]
    assert above.elements(above.batch) * 4 > 4 * (32 << 20)
    shape = SETTINGS["above_2g"].shapes(SETTINGS["above_2g"].gpu_batch)[0]
    assert torch.Size(shape).numel() * 2 > 2**31
    assert shrink(setting).elements(2) < 10_000  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# What is written
# --------------------------------------------------------------------------------------------------


def test_rows_survive_the_file(tmp_path: Path) -> None:
    results.write("loss", [row(), row(provider="cpu", ms=0.123456)], "cpu", tmp_path)
    ((header, rows),) = results.read(tmp_path)
    assert [r["provider"] for r in rows] == ["eager", "cpu"]
    assert rows[1]["ms"] == 0.1235
    assert rows[0]["features"] == 28
    for key in ("machine", "processor", "threads", "torch", "commit", "date"):
        assert header[key]


def test_report_of_made_up_rows(tmp_path: Path) -> None:
    """Numbers in the table are those of the rows, and a plot is drawn of each kind of data."""
    pytest.importorskip("matplotlib")
    rows = []
    for batch in (32, 4):
        for provider, ms in (("eager", 8.0), ("compile", 1.5), ("cpu", 1.0), ("copy", 0.5)):
            made = row(provider=provider, ms=ms * batch / 32)
            made.config = {**made.config, "batch": batch, "feature_bytes": 125_000 * batch}
            rows.append(made)
    results.write("loss", rows, "cpu", tmp_path)
    scaling = [row(bench="scaling", provider=p, ms=n) for p in ("eager", "cpu") for n in (1.0, 2.0, 3.0, 4.0)]
    for index, made in enumerate(scaling):
        prefix = "LN"[index % 2]
        made.config = {
            **made.config,
            "setting": f"{prefix}{index}",
            "elements": 10 + index,
            "features": 2 + index,
        }
    results.write("scaling", scaling, "cpu", tmp_path)
    step = [
        row(bench="step", provider=p, mode="step", case="net", peak_bytes=b)
        for p, b in (("none", 10), ("eager", 14))
    ]
    for made in step:
        added = {
            "added_time_percent": 3.14,
            "added_peak_percent": 40.0,
            "added_peak_of_features_percent": 99.0,
        }
        made.config = {**made.config, **added, "timeline": [(0.0, 5), (1.0, made.peak_bytes)]}
    results.write("step", step, "cpu", tmp_path)
    readme = tmp_path / "PROJECT.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 8 ms | 1.5 ms | 1 ms | 8.0x | 1.50x | 50 % |" in text
    assert "| net, eager | 1 ms | +3.1 % | +40.0 % | 99 % |" in text
    assert len(list(tmp_path.glob("*.png"))) == 4
    assert "time = " in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    "text",
    ["nothing", f"{report.BEGIN} only", f"{report.END} {report.BEGIN}", f"{report.BEGIN * 2} {report.END}"],
    ids=["no markers", "one marker", "wrong order", "twice"],
)
def test_markers_are_checked(text: str) -> None:
    with pytest.raises(ValueError, match="bench:begin"):
        report.insert(text, "block\n")


def test_readme_shows_the_committed_results() -> None:
    """Fails when README.md or the results changed and `python -m benchmarks report` was not run."""
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md yet")
    text = readme.read_text()
    assert report.insert(text, report.readme_block(results.read())) == text


def test_result_tables_are_those_of_the_committed_rows() -> None:
    runs = results.read()
    plots = [path.name for path in sorted(results.RESULTS.glob("*.png"))]
    if not runs:
        pytest.skip("no results are committed")
    assert report.full_report(runs, plots) == (results.RESULTS / "README.md").read_text()


def test_committed_results_have_their_peers() -> None:
    """No time without the ones it is compared with and without its error."""
    for _, rows in results.read():
        for r in rows:
            if r["bench"] == "loss" and r["provider"] in report.OURS and r["mode"] == "both":
                peers = [
                    other["provider"]
                    for other in rows
                    if (other["case"], other["mode"]) == (r["case"], "both")
                ]
                compiled = {"compile"} if r["features"] <= bench_loss.MOST_TO_COMPILE else set()
                assert {"eager", "copy"} | compiled <= set(peers)
                assert r["error"] < 1e-2
        assert json.dumps(rows)


def test_law_is_found_again() -> None:
    """Times made from a law give its constants."""
    made = [
        {"ms": (20 + 0.5 * n + b / 10_000) / 1e3, "features": n, "bytes": b}
        for n in (2, 8, 64, 256)
        for b in (1e4, 1e6, 1e8)
    ]
    law = scaling_law.fit(made)
    assert law is not None
    assert law.fixed_us == pytest.approx(20)
    assert law.per_feature_us == pytest.approx(0.5)
    assert law.gbps == pytest.approx(10)
    assert law.worst_percent < 1e-6
    slope = scaling_law.memory_per_element(
        [{"peak_bytes": 100 + 4.5 * n, "elements": n} for n in (10, 20, 1000)]
    )
    assert slope == pytest.approx((100, 4.5))


def test_law_has_no_negative_cost() -> None:
    """Times that fall with depth are noise: no cost per feature then."""
    law = scaling_law.fit([{"ms": 1.0 - 0.01 * n, "features": n, "bytes": 1.0} for n in (2, 4, 8, 16)])
    assert law is not None
    assert law.per_feature_us == 0


def test_the_page_about_performance_shows_the_committed_times_of_the_penalties_of_groups() -> None:
    named = {
        "foreach_add": "`_foreach_add_`",
        "cpu": "norms and `add_scaled_`",
        "eager": "formula layer by layer, no autograd",
        "autograd": "penalty as a loss, autograd",
        "torch-pruning": "Torch-Pruning 1.6.1, `GroupNormPruner.regularize`",
    }
    page = (results.ROOT / "docs" / "performance.md").read_text()
    (rows,) = [rows for _, rows in results.read() if rows and rows[0]["bench"] == "groups"]
    for provider, name in named.items():
        cells = []
        for mode in ("group lasso", "out-in"):
            found = report.find(rows, provider=provider, mode=mode)
            cells.append(f" {report.milliseconds(found['ms'])} " if found else " ")
        assert f"| {name} |{'|'.join(cells)}|\n" in page
