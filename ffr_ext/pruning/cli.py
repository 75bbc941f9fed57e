"""`python -m ffr_ext sparsity` and `python -m ffr_ext compact`: a checkpoint and the function that makes its
model."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import pickle
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from .compaction import compact
from .sparsity import sparsity
from .zero import zero_small_filters

Subparsers = Any  # what add_subparsers returns; argparse does not export its type


def add_sparsity(commands: Subparsers) -> None:
    parser = commands.add_parser("sparsity", help="count the dead filters of a checkpoint")
    _add_model(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.0, help="effective scale that counts as zero (0)"
    )
    _add_input(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run_sparsity)


def add_compact(commands: Subparsers) -> None:
    parser = commands.add_parser("compact", help="take the dead filters of a checkpoint out")
    _add_model(parser)
    _add_input(parser, required=True)
    parser.add_argument(
        "--threshold", type=float, help="first zero the filters whose effective scale is at most this"
    )
    parser.add_argument("--round-to", type=int, default=1, help="keep multiples of this many channels (1)")
    parser.add_argument("--min-channels", type=int, default=1, help="channels that a dead layer keeps (1)")
    parser.add_argument(
        "--not-strict", action="store_true", help="also remove what is not exact, and report the error"
    )
    parser.add_argument(
        "--output", "-o", required=True, help="where the state dict of the compact model goes"
    )
    parser.add_argument("--plan", help="where the plan goes (OUTPUT with .json for its suffix)")
    parser.add_argument("--explain", action="store_true", help="say for every set of channels why it stayed")
    parser.set_defaults(run=_run_compact)


def add_arguments(commands: Subparsers) -> None:
    """Both commands."""
    add_sparsity(commands)
    add_compact(commands)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="what makes the model: package.module:function, called without arguments"
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="file with a state dict, read with weights_only=True; without it: the model as made",
    )
    parser.add_argument("--key", help='where the state dict is in the checkpoint, such as "model"')


def _add_input(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--input",
        action="append",
        required=required,
        metavar="SHAPE",
        help="shape of an example input, such as 1,3,224,224 (random numbers), or 1,16:100 (whole numbers "
        "below 100); once for each positional input",
    )


def _run_sparsity(arguments: argparse.Namespace) -> int:
    with _clear_errors():
        model = _load(arguments)
        inputs = _inputs(arguments.input)
        report = sparsity(model, arguments.threshold, example_inputs=inputs)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)
    return 0


def _run_compact(arguments: argparse.Namespace) -> int:
    with _clear_errors():
        model = _load(arguments).eval()
        inputs = _inputs(arguments.input)
        if arguments.threshold is not None:
            zeroed = zero_small_filters(model, arguments.threshold, example_inputs=inputs)
            print(f"zeroed {sum(map(len, zeroed))} filters of {len(zeroed)} layers")
        result = compact(
            model,
            inputs,
            round_to=arguments.round_to,
            min_channels=arguments.min_channels,
            strict=not arguments.not_strict,
        )
        plan = arguments.plan or f"{os.path.splitext(arguments.output)[0]}.json"
        torch.save(result.model.state_dict(), arguments.output)
        result.plan.save(plan)
    print(result.report)
    if arguments.explain:
        print(result.report.explain())
    print(f"wrote {arguments.output} and {plan}")
    return 0


class _clear_errors:
    """A user's mistake is one line on stderr and exit status 2, not a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        if isinstance(
            error, ValueError | TypeError | OSError | ImportError | AttributeError | RuntimeError | KeyError
        ):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from error


def _load(arguments: argparse.Namespace) -> torch.nn.Module:
    module_name, colon, function = arguments.model.partition(":")
    if not colon:
        raise ValueError(f"model: expected package.module:function, got {arguments.model!r}")
    if os.getcwd() not in sys.path:  # as `python -m` has it
        sys.path.insert(0, os.getcwd())
    model = getattr(importlib.import_module(module_name), function)()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: {arguments.model} made a {type(model).__name__}, expected an nn.Module")
    if arguments.checkpoint is not None:
        load_checkpoint(model, arguments.checkpoint, arguments.key)
    elif arguments.key is not None:
        raise ValueError("--key: there is no checkpoint that it could be in")
    return model


# What wrappers put in front of every name of a state dict that is saved from them.
_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}


def load_checkpoint(model: torch.nn.Module, path: str, key: str | None = None) -> None:
    """Load the state dict in the file, or under `key` in it, with `weights_only=True`. The prefix of a wrapper is taken
    off where all names have it and fit without; stderr says so."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint: {path} is no file of tensors: save model.state_dict() alone ({_why(error)})"
        ) from error
    state, where = checkpoint, os.fspath(path)
    if key is not None:
        state, where = checkpoint.get(key) if isinstance(checkpoint, Mapping) else None, f"{path}[{key!r}]"
    if not _is_state_dict(state):
        entries = checkpoint.items() if isinstance(checkpoint, Mapping) else ()
        keys = ", ".join(repr(name) for name, entry in entries if _is_state_dict(entry))
        hint = f"; there is a state dict under {keys}: pass --key" if keys else ""
        raise ValueError(f"checkpoint: no state dict in {where}{hint}")
    model.load_state_dict(_without_wrappers(state, model, where))


def _why(error: Exception) -> str:
    """What the unpickler met, without its advice."""
    met = re.search(
        r"WeightsUnpickler error:\s*(.*?)(?: was not an allowed| by default|$)", str(error), re.MULTILINE
    )
    said = met[1] if met else next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {said}"


def _is_state_dict(entry: Any) -> bool:
    return isinstance(entry, Mapping) and any(isinstance(value, Tensor) for value in entry.values())


def _without_wrappers(state: Mapping[str, Any], model: torch.nn.Module, where: str) -> Mapping[str, Any]:
    stripped: dict[str, Any] = (
        copy.copy(state) if isinstance(state, dict) else dict(state)
    )  # with its versions
    removed = ""
    while set(stripped) != set(model.state_dict()):
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in stripped)), None)
        if prefix is None:
            return state
        removed += prefix
        consume_prefix_in_state_dict_if_present(stripped, prefix)
    if removed:
        whose = ", ".join(name for prefix, name in _WRAPPERS.items() if prefix in removed)
        print(f"note: took the prefix {removed!r} ({whose}) off all names in {where}", file=sys.stderr)
    return stripped


def _inputs(shapes: list[str] | None) -> tuple[torch.Tensor, ...] | None:
    if not shapes:
        return None
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for text in shapes:
        sizes, colon, below = text.partition(":")
        try:
            shape = [int(s) for s in sizes.split(",")]
            tensors.append(
                torch.randint(int(below), shape, generator=generator)
                if colon
                else torch.randn(shape, generator=generator)
            )
        except ValueError:
            raise ValueError(
                f"--input: expected a shape such as 1,3,224,224 or 1,16:100, got {text!r}"
            ) from None
    return tuple(tensors)
