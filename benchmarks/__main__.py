"""`python -m benchmarks`: measure everything on this machine and write `benchmarks/results/`. Two more commands have
options of their own: `python -m benchmarks arena --help`, `python -m benchmarks networks --help`.

python -m benchmarks            all benchmarks, on the GPU if there is one, else on the CPU, then the report
python -m benchmarks loss --only tiny3 resnet56 --modes both --no-write
python -m benchmarks loss --processes 5       medians over fresh processes
python -m benchmarks step --device cuda
python -m benchmarks arena --help             which method, for which budget, at what cost
python -m benchmarks networks --help          what compact makes of networks of four libraries, at what cost
python -m benchmarks report     tables, plots and the README's table from the results on disk
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from . import processes
from .harness.measure import QUICK, Options, Row
from .reporting import results, tables
from .suites import compaction, groups, loss, scaling, step, step_compiled

BENCHES = {
    "loss": loss.main,
    "scaling": scaling.main,
    "step": step.main,
    "step-compiled": step_compiled.main,
    "compaction": compaction.main,
    "groups": groups.main,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__.split("\n\n")[0])
    parser.add_argument("bench", nargs="?", default="all", choices=["all", "report", *BENCHES])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="SETTING", help="settings of benchmarks/harness/shapes.py"
    )
    parser.add_argument("--providers", nargs="*", default=[], metavar="PROVIDER")
    parser.add_argument(
        "--modes", nargs="*", default=[], metavar="MODE", help="forward, backward, both, first"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, two rounds, nothing written: a smoke test"
    )
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--processes", type=int, default=1, help="measure in as many fresh processes")
    parser.add_argument(
        "--rows", type=Path, help=argparse.SUPPRESS
    )  # where a process of many leaves its rows
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["arena"]:
        from .arena import main as arena  # trains: needs the examples' networks and data

        return arena.main(given[1:])
    if given[:1] == ["networks"]:
        from .networks import main as networks  # reads torchvision, timm and others, where they are installed

        return networks.main(given[1:])
    options = parser.parse_args(given)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.bench != "report":
        results.print_header(options.device)
        for name, run in BENCHES.items():
            if options.bench not in ("all", name):
                continue
            rows = _rows(name, run, options, given)
            if options.rows:
                processes.save(rows, options.rows)
            if not (options.no_write or options.tiny):
                print(f"wrote {results.write(name, rows, options.device)}")
    if options.bench == "report" or (options.bench == "all" and not (options.no_write or options.tiny)):
        tables.main()
    return 0


def _rows(
    name: str, run: Callable[[Options], list[Row]], options: argparse.Namespace, given: list[str]
) -> list[Row]:
    """The rows of one benchmark, of this process or of those that it starts."""
    if options.processes > 1 and options.rows is None:
        rest = list(given)
        if options.bench in rest:
            rest.remove(options.bench)
        return processes.measured_in_processes([name, *rest], options.processes)
    return run(
        Options(
            device=options.device,
            only=options.only,
            providers=options.providers,
            modes=options.modes,
            effort=QUICK if options.tiny else None,
            tiny=options.tiny,
            report=results.print_table,
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
