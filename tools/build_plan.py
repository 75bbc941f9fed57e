"""Decides what an install builds, from ``FFR_EXT_BUILD`` and the tools that are there. setup.py loads this
file.

A tool that is missing makes ``auto`` leave a part out, with a sentence; ``cpu`` and ``cuda`` refuse instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import cuda_toolkit
import find_torch

MODES = ("auto", "cpu", "cuda", "off")


class BuildError(Exception):
    """What was asked for cannot be built here; the message is a sentence for the user."""


class Plan(NamedTuple):
    """What this install builds, and a sentence for every part that it leaves out."""

    mode: str
    native: bool
    cuda: bool
    notes: list[str]


def make_plan(mode: str) -> Plan:
    """Looks for the tools. Raises BuildError where ``mode`` requires what cannot be had, and for an unknown
    mode.
    """
    if mode not in MODES:
        raise BuildError(f"FFR_EXT_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "off":
        return Plan(mode, False, False, ["FFR_EXT_BUILD=off asked for no native code"])

    missing = missing_tools()
    if missing:
        if mode != "auto":
            raise BuildError(f"FFR_EXT_BUILD={mode} cannot be built: {'; '.join(missing)}")
        return Plan(mode, False, False, missing)
    if mode == "cpu":
        return Plan(mode, True, False, ["FFR_EXT_BUILD=cpu asked for no CUDA kernels"])

    reason = no_cuda(mode)
    if reason and mode == "cuda":
        raise BuildError(f"FFR_EXT_BUILD=cuda cannot be built: {reason}")
    return Plan(mode, True, not reason, [reason] if reason else [])


def missing_tools() -> list[str]:
    """One sentence for each thing that the native code cannot be compiled without."""
    missing = []
    if sys.platform != "linux":
        missing.append(f"the native code is built on Linux only, this is {sys.platform}")
    if find_cxx() is None:
        told = os.environ.get("CXX")
        missing.append(f"CXX={told} is not found" if told else "no C++ compiler found (c++, g++ or clang++)")
    missing += [f"no {tool} found" for tool in ("cmake", "ninja") if find_program(tool) is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("the Python package pybind11 is not installed")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append(
            f"no Python.h in {sysconfig.get_path('include')} (on Debian and Ubuntu: package python3-dev)"
        )
    try:
        find_torch.find_torch()
    except find_torch.TorchNotFound as error:
        missing.append(str(error))
    return missing


def no_cuda(mode: str) -> str:
    """Why no CUDA kernels are built, "" if they are."""
    if not cuda_sources():
        return "no CUDA kernels: this source tree has none"
    torch_cuda = find_torch.find_torch().cuda
    if mode == "auto" and not torch_cuda:
        return "no CUDA kernels: torch is a build without CUDA"
    try:
        toolkit = cuda_toolkit.find_toolkit()
        cuda_toolkit.choose_archs(toolkit, os.environ.get("FFR_EXT_CUDA_ARCHS", ""))
    except cuda_toolkit.ToolkitError as error:
        return f"no CUDA kernels: {error}"
    # cudart is linked statically, and one of another major version may want a newer driver than torch's does.
    if mode == "auto" and toolkit.version.split(".")[0] != torch_cuda.split(".")[0]:
        return (
            f"no CUDA kernels: torch is built for CUDA {torch_cuda}, {toolkit.nvcc} is of {toolkit.version} "
            "(FFR_EXT_BUILD=cuda builds them all the same)"
        )
    return ""


def cuda_sources() -> list[Path]:
    return sorted((Path(__file__).resolve().parent.parent / "csrc" / "cuda").glob("*.cu"))


def find_cxx() -> str | None:
    told = os.environ.get("CXX")
    for name in told.split()[:1] if told else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    return None


def find_program(name: str) -> str | None:
    """On PATH, beside the running Python, or from the wheel of that name (cmake, ninja): pip may run with a
    bare PATH.
    """
    beside = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    found = shutil.which(name, path=beside)
    if found:
        return found
    try:
        package = importlib.import_module(name)
    except ImportError:
        return None
    folder = getattr(package, "CMAKE_BIN_DIR", None) or getattr(package, "BIN_DIR", None)
    return shutil.which(name, path=folder) if folder else None
