"""Tables, plots and the scaling law, all from the rows under `benchmarks/results/`, and the README's table.

`python -m benchmarks report` writes `benchmarks/results/README.md`, the plots beside it, and what stands
between `<!-- bench:begin -->` and `<!-- bench:end -->` in the project's README.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .results import RESULTS, ROOT, read
from .scaling_law import law_lines

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
Line = dict[str, Any]  # a row as it was written
Run = tuple[Line, list[Line]]  # header and rows of one file

README_SETTINGS = (
    "tiny3",
    "resnet20",
    "resnet56",
    "resnet110",
    "vgg16",
    "resnet50",
    "vit_b",
    "deep",
    "above_llc",
)
OURS = ("cuda", "triton", "cpu")  # in the order in which "auto" takes them
CUT_CASES = {
    "resnet50/zeros": "ResNet-50, half of the filters inside its blocks constantly 0",
    "resnet50/constants": "the same, half of those at another constant",
}
NAMES = {"eager": "eager", "compile": "torch.compile", "none": "no penalty"}


def find(rows: Iterable[Line], **wanted: Any) -> Line | None:
    """The first row with these values."""
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), None)


def our_row(rows: Iterable[Line], **wanted: Any) -> Line | None:
    """The row of the backend that `backend="auto"` takes."""
    rows = list(rows)
    return next((row for name in OURS if (row := find(rows, provider=name, **wanted))), None)


def usual(rows: Iterable[Line]) -> list[Line]:
    """Rows in the usual form of their device: fp32 contiguous on a CPU, bf16 channels_last on a GPU."""
    form = {"cpu": ("float32", "contiguous"), "cuda": ("bfloat16", "channels_last")}
    return [
        row
        for row in rows
        if (row.get("dtype"), row.get("layout")) == form[row["device"]]
        and (row.get("norm"), row.get("curvature_kind")) == ("l1", "difference")
    ]


def milliseconds(value: float) -> str:
    """Three significant digits, in the unit that is easiest to read."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value * 1000:.0f} us" if value < 0.1 else f"{value:.3g} ms"


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, first column left, the others right."""
    rule = [":---", *("---:" for _ in columns[1:])]
    return [f"| {' | '.join(cells)} |" for cells in ([*columns], rule, *lines)]


# --------------------------------------------------------------------------------------------------
# What the README shows
# --------------------------------------------------------------------------------------------------


def machine_line(header: Line) -> str:
    """Where the numbers come from, in one sentence."""
    where = header["gpu"] or f"{header['processor']}, {header['threads']} threads"
    versions = f"torch {header['torch']}"
    if header["gpu"]:
        versions += f", triton {header['triton']}, driver {header['driver']}"
    return f"**{where}**, {versions}, commit {header['commit']}, {header['date']}."


def loss_table(rows: Sequence[Line]) -> list[str]:
    """Forward and backward of the loss, every setting in its usual form."""
    lines = []
    for setting in README_SETTINGS:
        of_setting = [r for r in usual(rows) if r.get("setting") == setting]
        batches = [r["batch"] for r in of_setting if r["mode"] == "both"]
        if not batches:
            continue
        # ResNet-56 is measured at many batch sizes; the first is the setting's own.
        both = [r for r in of_setting if r["mode"] == "both" and r["batch"] == batches[0]]
        ours, eager, compiled = our_row(both), find(both, provider="eager"), find(both, provider="compile")
        if ours is None or eager is None:
            continue
        lines.append(
            [
                f"{setting}, batch {ours['batch']}: {ours['features']} features, "
                f"{megabytes(ours['feature_bytes'])}",
                milliseconds(eager["ms"]),
                milliseconds(compiled["ms"]) if compiled else "",
                milliseconds(ours["ms"]),
                f"{eager['ms'] / ours['ms']:.1f}x{of_processes(eager, ours)}",
                f"{compiled['ms'] / ours['ms']:.2f}x" if compiled else "",
                f"{ours['copy_percent']:.0f} %",
                f"{megabytes(eager['peak_bytes'])} / {megabytes(ours['peak_bytes'])}",
            ]
        )
    columns = ["l1 loss, forward + backward", "eager", "torch.compile", "ffr_ext", "vs eager", "vs compile"]
    return table([*columns, "of a copy", "peak memory eager / ours"], lines) if lines else []


def of_processes(slow: Line, fast: Line) -> str:
    """The least and the greatest ratio of the two in one process, where they were measured in several."""
    slower, faster = slow.get("ms_of_processes", ()), fast.get("ms_of_processes", ())
    if not slower or len(slower) != len(faster):
        return ""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    return f" ({min(ratios):.1f} to {max(ratios):.1f})"


def step_table(rows: Sequence[Line]) -> list[str]:
    """Training steps with the penalty, relative to the plain step."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        plain = find(of_case, provider="none")
        for row in of_case:
            if row is plain or plain is None:
                continue
            lines.append(
                [
                    f"{case}, {NAMES.get(row['provider'], row['provider'])}",
                    milliseconds(plain["ms"]),
                    added_time(row),
                    f"{row['added_peak_percent']:+.1f} %",
                    f"{row['added_peak_of_features_percent']:.0f} %",
                ]
            )
    columns = ["training step with penalty", "plain step", "added time", "added peak memory"]
    return table([*columns, "of the features' bytes"], lines) if lines else []


def compiled_step_table(rows: Sequence[Line]) -> list[str]:
    """Compiled training steps: what each way to the penalty adds, and how long the first step takes."""
    ways = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "none"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["provider"]: row for row in rows if row["case"] == case}
        plain = of_case.get("none")
        if plain is None:
            continue
        cells = [case, milliseconds(plain["ms"])]
        for way in ways:
            row = of_case.get(way)
            cells.append(added_time(row) if row else "")
        first = [of_case[name]["first_step_seconds"] for name in ("none", *ways) if name in of_case]
        lines.append([*cells, " / ".join(f"{seconds:.0f}" for seconds in first)])
    columns = ["compiled step", "plain", *ways, f"first step of each, s (plain / {' / '.join(ways)})"]
    return table(columns, lines) if lines else []


def added_time(row: Line) -> str:
    """What a step adds to the plain one, with the least and the greatest of the processes."""
    text = f"{row['added_time_percent']:+.1f} %"
    each = row.get("added_time_percent_of_processes", ())
    return f"{text} ({min(each):+.1f} to {max(each):+.1f})" if each else text


def compaction_table(rows: Sequence[Line]) -> list[str]:
    """Whole networks cut by `compact` and by Torch-Pruning: how long, and how far off the outputs are."""
    cut = [row for row in rows if row["mode"] == "compact"]
    lines = []
    for case in dict.fromkeys(row["case"] for row in cut):
        ours = find(cut, case=case, provider="compact")
        other = find(cut, case=case, provider="torch-pruning")
        if ours is None:
            continue
        cells = [milliseconds(ours["ms"]), f"{ours['error']:.1e}"]
        cells += [milliseconds(other["ms"]), f"{other['error']:.1e}"] if other else ["", ""]
        lines.append([CUT_CASES.get(case, case), *cells])
    columns = ["a network with dead filters, cut", "`compact`", "error of the outputs"]
    return table([*columns, "Torch-Pruning, told which", "error of the outputs"], lines) if lines else []


def first_call_line(rows: Sequence[Line]) -> list[str]:
    """First calls of a process, in one sentence."""
    case = find(rows, setting="resnet56", mode="first")
    if case is None:
        return []
    ours = our_row(rows, setting="resnet56", mode="first")
    eager = find(rows, provider="eager", setting="resnet56", mode="first")
    cold = find(rows, provider="compile", setting="resnet56", mode="first")
    warm = find(rows, provider="compile", setting="resnet56", mode="first_warm")
    if ours is None or eager is None:
        return []
    text = f"First call of a process (ResNet-56): ffr_ext {milliseconds(ours['ms'])}, "
    text += f"eager {milliseconds(eager['ms'])}"
    if cold and warm:
        text += f", torch.compile {milliseconds(cold['ms'])} ({milliseconds(warm['ms'])} with its disk cache)"
    return [text + "."]


def megabytes(value: float) -> str:
    """Bytes as MB, or kB where that is a fraction."""
    return f"{value / 1e3:.0f} kB" if value < 1e6 else f"{value / 1e6:.3g} MB"


def by_machine(runs: Sequence[Run]) -> dict[str, dict[str, Run]]:
    """machine -> bench -> (header, rows)."""
    machines: dict[str, dict[str, Run]] = {}
    for header, rows in runs:
        if rows:
            machines.setdefault(header["machine"], {})[rows[0]["bench"]] = (header, rows)
    return machines


def readme_block(runs: Sequence[Run]) -> str:
    """What stands between the markers."""
    parts: list[str] = []
    for benches in by_machine(runs).values():
        if "loss" in benches:
            header, rows = benches["loss"]
            parts += [machine_line(header), "", *loss_table(rows), "", *first_call_line(rows), ""]
        if "step" in benches:
            header, rows = benches["step"]
            if "loss" not in benches or benches["loss"][0]["commit"] != header["commit"]:
                parts += [machine_line(header), ""]
            parts += [*step_table(rows), ""]
        if "step-compiled" in benches:
            header, rows = benches["step-compiled"]
            parts += [machine_line(header), "", *compiled_step_table(rows), ""]
        if "compaction" in benches:
            header, rows = benches["compaction"]
            parts += [machine_line(header), "", *compaction_table(rows), ""]
    if not parts:
        return "No results yet: `make bench` makes them.\n"
    note = "Made by `python -m benchmarks report` from `benchmarks/results/`: medians, "
    note += "all providers measured in turns in one process; where a range is given, over several processes."
    return "\n".join([note, "", *parts]).rstrip() + "\n"


def insert(text: str, block: str) -> str:
    """`text` with `block` between the markers. ValueError without the markers, in this order and once
    each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END}, once each")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{block}{END}{after}"


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def full_report(runs: Sequence[Run], plots: Sequence[str] = ()) -> str:
    """Every row of every machine, the scaling laws and the plots."""
    parts = ["# Benchmark results", "", "Written by `python -m benchmarks report`; do not edit.", ""]
    for machine, benches in by_machine(runs).items():
        parts += [f"## {machine}", ""]
        for bench, (header, rows) in benches.items():
            parts += [f"### {bench}", ""]
            told = ", ".join(f"{key} {value}" for key, value in header.items() if value is not None)
            parts += [told + ".", "", *all_rows(rows), ""]
            if bench == "scaling":
                parts += [*law_lines(rows), ""]
        parts += [f"![{name}]({name})" for name in sorted(plots) if machine in name] + [""]
    return "\n".join(parts).rstrip() + "\n"


def all_rows(rows: Sequence[Line]) -> list[str]:
    """One line per row."""
    lines = []
    for row in rows:
        share = row["copy_percent"]
        peak, error = row["peak_bytes"], row["error"]
        lines.append(
            [
                row["case"],
                row["mode"],
                NAMES.get(row["provider"], row["provider"]),
                milliseconds(row["ms"]),
                f"{milliseconds(row['ms_p20'])} - {milliseconds(row['ms_p80'])}",
                f"{row['gbps']:.1f}" if row["gbps"] else "",
                "" if share is None else f"{share:.0f} %",
                "" if peak is None else megabytes(peak),
                "" if error is None else f"{error:.1e}",
            ]
        )
    columns = ["case", "mode", "provider", "median", "20 - 80 %", "GB/s", "of a copy", "peak memory", "error"]
    return table(columns, lines)


def main(readme: Path = ROOT / "README.md", directory: Path = RESULTS) -> None:
    """Write everything; say what was written."""
    runs = read(directory)
    plots: list[str] = []
    try:
        from .plots import draw_all
    except ModuleNotFoundError as error:
        print(f"no plots: {error}")
    else:
        plots = [path.name for path in draw_all(by_machine(runs), directory)]
    (directory / "README.md").write_text(full_report(runs, plots))
    for _, benches in by_machine(runs).items():
        if "scaling" in benches:
            print("\n".join(law_lines(benches["scaling"][1])))
    block = readme_block(runs)
    print(block)
    if readme.exists() and BEGIN in readme.read_text():
        readme.write_text(insert(readme.read_text(), block))
        print(f"wrote the table into {readme}")
