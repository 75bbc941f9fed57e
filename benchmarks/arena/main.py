"""The command line of `python -m benchmarks arena`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch

from ..reporting import results
from . import pictures, report
from .ablation import ABLATION, ALL
from .methods import METHODS
from .runner import Arena
from .training import Settings

OWN = {"method", "strength", "seed"}  # of Settings: what the arena varies


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        "python -m benchmarks arena", description="Which method, for which budget, at what cost?"
    )
    groups = ", ".join(METHODS)
    arguments.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=list(ALL), help=f"default: {groups}"
    )
    arguments.add_argument(
        "--ablation", action="store_true", help=f"FFR's own choices: {', '.join(ABLATION)}"
    )
    arguments.add_argument(
        "--budgets", nargs="+", type=float, default=[0.5, 0.25, 0.12], help="shares of the FLOPs"
    )
    arguments.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments.add_argument("--tries", type=int, default=4, help="strengths that are tried for each method")
    arguments.add_argument(
        "--strengths",
        nargs="+",
        type=_strengths,
        default=[],
        metavar="METHOD=A,B,C",
        help="to try instead of a method's own; the same number for all",
    )
    arguments.add_argument("--jobs", type=int, default=1, help="runs side by side")
    arguments.add_argument("--threads", type=int, default=1, help="of each run")
    arguments.add_argument(
        "--out", type=Path, default=Path("runs/arena"), help="checkpoints and results of the runs"
    )
    arguments.add_argument(
        "--report", type=Path, help="where the CSV, the table and the pictures go (default: --out)"
    )
    arguments.add_argument("--report-only", action="store_true", help="of what is finished; trains nothing")
    arguments.add_argument(
        "--pages", nargs="*", type=Path, default=[], help="Markdown whose marked tables are made anew"
    )
    for field in fields(Settings):
        if field.name not in OWN:
            name = f"--{field.name.replace('_', '-')}"
            arguments.add_argument(
                name, type=type(field.default), default=field.default, help=f"default {field.default!r}"
            )
    return arguments


def _strengths(text: str) -> tuple[str, tuple[float, ...]]:
    """`ffr=0.1,0.3` as a method and the strengths to try."""
    method, _, numbers = text.partition("=")
    if method not in ALL:
        raise argparse.ArgumentTypeError(f"unknown method {method!r}; there are {', '.join(ALL)}")
    try:
        return method, tuple(float(number) for number in numbers.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {method}=A,B,C with numbers, got {text!r}") from None


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    own = {f.name: getattr(options, f.name) for f in fields(Settings) if f.name not in OWN}
    arena = Arena(
        methods=list(ABLATION) if options.ablation else options.methods,
        budgets=options.budgets,
        seeds=options.seeds,
        base=Settings(method="none", strength=0.0, seed=0, **own),
        out=options.out.resolve(),
        tries=options.tries,
        jobs=options.jobs,
        threads=options.threads,
        own_strengths=dict(options.strengths),
    )
    if not options.report_only:
        arena.run()
    arena.measure()
    rows = arena.rows()
    if not rows:
        print("no run is finished yet")
        return 1
    folder = options.report or options.out
    name = f"{options.data}-{options.model}{'-ablation' if options.ablation else ''}"
    about = {"commit": results.commit(), "torch": torch.__version__, "processor": results.processor()}
    report.write_csv(rows, folder / f"{name}.csv", about)
    report.write_csv(arena.search_rows(), folder / f"{name}-search.csv", {}, report.SEARCH_COLUMNS)
    rows = report.read_csv(folder / f"{name}.csv")
    for kind in ("died", "budgets"):
        print(f"\n{kind}\n{report.TABLES[kind](rows)}")
    drawn = pictures.draw(rows, folder, name)
    for page in options.pages:
        page.write_text(report.fill(page.read_text(encoding="utf-8"), folder), encoding="utf-8")
    print(f"\nwrote {folder / name}.csv and {len(drawn)} pictures")
    return 0
