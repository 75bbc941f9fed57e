"""Weights of a checkpoint file into a model, and what to say where they do not fit."""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

# What wrappers put in front of every name of a state dict that is saved from them.
WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}


def load_checkpoint(model: nn.Module, path: str, key: str | None = None) -> None:
    """Load the state dict in the file, or under `key` in it. The prefix of a wrapper is taken off where all names
    have it and fit without; stderr says so.

    ValueError where something does not fit, with the `--key` that might.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # on foreign bytes the unpickler raises anything
        raise ValueError(
            f"checkpoint: {path} holds other objects than tensors{_why_refused(error)}; save model.state_dict() "
            "alone"
        ) from error
    keys = [name for name in _keys_of_state_dicts(checkpoint) if name != key]
    state, where = checkpoint, os.fspath(path)
    if key is not None:
        if not isinstance(checkpoint, Mapping) or key not in checkpoint:
            raise ValueError(f"--key: {path} has no entry {key!r}" + _key_hint(keys))
        state, where = checkpoint[key], f"{path}[{key!r}]"
    if not isinstance(state, Mapping):
        raise ValueError(
            f"checkpoint: expected a state dict in {where}, got {type(state).__name__}{_key_hint(keys)}"
        )
    state = _without_wrappers(state, model, where)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        hint = _key_hint(keys) or _part_hint(state, model)
        raise ValueError(
            f"checkpoint: {where} does not fit {type(model).__name__}: {_misfit(state, model, error)}{hint}"
        ) from error


def _why_refused(error: Exception) -> str:
    """The class that is no tensor; where none is named, the unpickler's reason without its advice."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    if named:
        return f" ({named[1]})"
    advice = ("In PyTorch", "Please file an issue", "Check the documentation")
    lines = [line.strip().removeprefix("Weights only load failed. ") for line in str(error).splitlines()]
    reason = next((line.split(". ")[0] for line in lines if line and not line.startswith(advice)), "")
    said = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    return f", or is no file that torch.save wrote ({said})"


def _keys_of_state_dicts(checkpoint: Any) -> list[str]:
    """The entries that are mappings of names to tensors."""
    if not isinstance(checkpoint, Mapping):
        return []
    return [
        key
        for key, entry in checkpoint.items()
        if isinstance(key, str)
        and isinstance(entry, Mapping)
        and entry
        and all(
            isinstance(n, str) and (isinstance(t, Tensor) or n.endswith("_extra_state"))
            for n, t in entry.items()
        )
    ]


def _key_hint(keys: list[str]) -> str:
    if not keys:
        return ""
    return f"; there is a state dict under {_some(map(repr, keys))}: pass --key {keys[0] if len(keys) == 1 else 'NAME'}"


def _without_wrappers(state: Mapping[str, Any], model: nn.Module, where: str) -> Mapping[str, Any]:
    expected = set(model.state_dict())
    stripped: dict[str, Any] = copy.copy(state) if isinstance(state, dict) else dict(state)
    removed = []
    while stripped and set(stripped) != expected:
        prefix = next((p for p in WRAPPERS if all(str(name).startswith(p) for name in stripped)), None)
        if prefix is None:
            return state
        removed.append(prefix)
        consume_prefix_in_state_dict_if_present(stripped, prefix)
    if removed:
        whose = ", ".join(WRAPPERS[prefix] for prefix in removed)
        print(
            f"note: took the prefix {''.join(removed)!r} ({whose}) off all names in {where}", file=sys.stderr
        )
    return stripped


def _misfit(state: Mapping[str, Any], model: nn.Module, error: Exception) -> str:
    """What differs, on one line."""
    expected = model.state_dict()
    missing, unknown = [n for n in expected if n not in state], [str(n) for n in state if n not in expected]
    parts = [f"{_some(missing)} missing"] if missing else []
    parts += [f"{_some(unknown)} not in the model"] if unknown else []
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if isinstance(tensor, Tensor)
        and isinstance(state.get(name), Tensor)
        and state[name].shape != tensor.shape
    ]
    parts += [f"other shapes: {_some(shapes)}"] if shapes else []
    return "; ".join(parts) or " ".join(str(error).split())


def _part_hint(state: Mapping[str, Any], model: nn.Module) -> str:
    """The model is a part of what was saved, as in a LightningModule."""
    prefix = f"{str(next(iter(state), '')).split('.')[0]}."
    names = [str(name) for name in state]
    whole = all(name.startswith(prefix) for name in names)
    if whole and {name.removeprefix(prefix) for name in names} == set(model.state_dict()):
        return f"; without {prefix!r} in front the names would fit: save the state dict of that part"
    return ""


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
