"""torchvision, timm and others that import them, wherever `make test` or the user has put them."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Where tools/bootstrap.sh puts them: in a folder that only this file looks into.
FOLDER = Path(sys.prefix) / "vision"

_DECLARED: list[Any] = []  # a declaration holds as long as its library object lives


def library(name: str) -> ModuleType:
    """The module `name`; ImportError where it is missing."""
    if name in sys.modules:
        return sys.modules[name]
    with folder_on_path():
        _declare_what_torchvision_lacks()
        return importlib.import_module(name)


@contextlib.contextmanager
def folder_on_path() -> Iterator[None]:
    """Inside, the folder is the last place that modules and their versions are looked for in."""
    sys.path.append(str(FOLDER))
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))


def _declare_what_torchvision_lacks() -> None:
    """PyPI's torchvision is built for CUDA. Beside a CPU build of torch its native library does not load, which it
    takes, but for one operator that it goes on to describe: nms, whose declaration is in that library. Its models of
    images do not use it."""
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None or "torchvision" in sys.modules or _DECLARED:
        return
    natives = list(Path(spec.origin).parent.glob("_C*.so"))
    try:
        for native in natives:
            torch.ops.load_library(str(native))
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        for op in ("nms", "qnms"):
            declared.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(declared)
