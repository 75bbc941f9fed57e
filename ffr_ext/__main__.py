"""``python -m ffr_ext COMMAND``. Every command is one function that adds its parser."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__, env
from .pruning import cli
from .selftest import selftest

Subparsers = Any  # what add_subparsers returns; argparse does not export its type


def _add_info(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "info", help="versions, devices, and which backends work and why the others do not"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run_info)


def _run_info(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(env.collect(), indent=2))
    else:
        env.show_config()
    return 0


def _add_selftest(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "selftest", help="compare every available backend with the reference; exit status 1 on a mismatch"
    )
    parser.add_argument("--backend", help="only this one: cpu, cuda or triton")
    parser.set_defaults(run=_run_selftest)


def _run_selftest(arguments: argparse.Namespace) -> int:
    try:
        return 0 if selftest(arguments.backend) else 1
    except (ValueError, RuntimeError) as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 2


COMMANDS: tuple[Callable[[Subparsers], None], ...] = (_add_info, _add_selftest, cli.add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ffr_ext", description="Feature flow regularization for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"ffr_ext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
