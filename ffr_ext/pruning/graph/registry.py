"""The table of op rules. Filled by the modules of rules, read by `Analysis`, which knows none of them.

A rule is `rule(analysis, node, arguments) -> Flow`, with the arguments by name and flows in the place of
tensors. It returns a list for an op with several results, and None where this use of the op is beyond it;
then the op counts as unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from .trace import out_of_place_name

# (analysis, node, arguments) -> Flow: see above.
Rule = Callable[..., Any]

_RULES: dict[str, Rule] = {}

# What holds for whole families of ops, under names that no op has.
POINTWISE, FOLD = "<pointwise>", "<fold>"

# Pointwise ops that torch does not tag as such.
_UNTAGGED_POINTWISE = {
    "hardswish",
    "log_sigmoid",
    "hardshrink",
    "softshrink",
    "rsub",
    "square",
    "__and__",
    "__or__",
}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def find_rule(node: Node) -> Rule | None:
    """The rule of the op itself, or of its family; None for random and uninitialised values."""
    name = out_of_place_name(node)
    tags = getattr(node.target, "tags", [])
    if name in _RULES:
        return _RULES[name]
    if torch.Tag.nondeterministic_seeded in tags or name.startswith(("empty", "new_empty")):
        return None
    if torch.Tag.pointwise in tags or name in _UNTAGGED_POINTWISE:
        return _RULES[POINTWISE]
    return _RULES[FOLD]
