"""Which nvcc this machine has, and for which GPU architectures it can and shall compile.

setup.py loads this file; CMake runs it: ``python tools/cuda_toolkit.py ["80;90"]`` prints one ``name=value``
a line. nvcc is asked for what it knows, so an older or newer toolkit than the ones tried drops or keeps
architectures by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# Ampere, Hopper, Blackwell data centre, Blackwell desktop: machine code of one minor version runs on the
# later ones of the same major. The newest is also kept as PTX, which the driver compiles for GPUs that come
# later.
DEFAULT_ARCHS = ("80", "90", "100", "120")


class ToolkitError(Exception):
    """No nvcc, or one that cannot do what was asked."""


class Toolkit(NamedTuple):
    """An nvcc, its version ("13.0") and the architectures it knows ("75", "80", ...)."""

    nvcc: Path
    version: str
    known: tuple[str, ...]


def find_toolkit(environ: Mapping[str, str] = os.environ) -> Toolkit:
    """The nvcc of ``CUDACXX``, else of ``CUDA_HOME`` / ``CUDA_PATH``, else of PATH, else of /usr/local/cuda.

    Raises ToolkitError if there is none or it does not run.
    """
    nvcc = _find_nvcc(environ)
    try:
        about = _run(nvcc, "--version")
        known = tuple(re.findall(r"sm_(\d+)\b", _run(nvcc, "--list-gpu-code")))
    except (OSError, subprocess.CalledProcessError) as error:
        raise ToolkitError(f"{nvcc} does not run: {error}") from error
    match = re.search(r"release (\d+\.\d+)", about)
    if match is None:
        raise ToolkitError(f"{nvcc} --version names no release")
    return Toolkit(nvcc, match[1], known)


def _find_nvcc(environ: Mapping[str, str]) -> Path:
    told = environ.get("CUDACXX")
    if told:
        found = shutil.which(told, path=environ.get("PATH"))
        if found is None:
            raise ToolkitError(f"CUDACXX={told} is not an executable file")
        return Path(found)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        home = environ.get(name)
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc", path=environ.get("PATH"))
    if found is not None:
        return Path(found)
    usual = Path("/usr/local/cuda/bin/nvcc")
    if usual.is_file():
        return usual
    raise ToolkitError("no nvcc found (looked at CUDACXX, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda)")


def _run(nvcc: Path, option: str) -> str:
    return subprocess.run([nvcc, option], check=True, capture_output=True, text=True).stdout


def choose_archs(toolkit: Toolkit, requested: str = "") -> list[str]:
    """``requested`` ("90", "80;90", "9.0,12.0", "90a") as a sorted list, or the default list as far as nvcc
    knows it.

    The newest architecture without a suffix ends in "+PTX". Raises ToolkitError for one that nvcc does not
    know.
    """
    if requested.strip():
        archs = []
        for item in re.split(r"[;,\s]+", requested.strip()):
            match = re.fullmatch(r"(\d+)\.?(\d)([af]?)", item)
            if match is None:
                raise ToolkitError(
                    f"FFR_EXT_CUDA_ARCHS: expected architectures such as 90 or 80;90, got {item!r}"
                )
            archs.append(match[1] + match[2] + match[3])
        unknown = [arch for arch in archs if arch.rstrip("af") not in toolkit.known]
        if unknown:
            raise ToolkitError(
                f"nvcc {toolkit.version} does not compile for {', '.join(unknown)}, "
                f"but for {', '.join(toolkit.known)}"
            )
    else:
        archs = [arch for arch in DEFAULT_ARCHS if arch in toolkit.known]
        if not archs:
            raise ToolkitError(f"nvcc {toolkit.version} knows none of {', '.join(DEFAULT_ARCHS)}")
    archs = sorted(set(archs), key=lambda arch: (int(arch.rstrip("af")), arch))
    plain = [arch for arch in archs if arch.isdigit()]
    return [arch + "+PTX" if plain and arch == plain[-1] else arch for arch in archs]


def cmake_archs(archs: list[str]) -> str:
    """The same list for CMAKE_CUDA_ARCHITECTURES, where NN-real is machine code alone and NN has PTX too."""
    return ";".join(arch.removesuffix("+PTX") if arch.endswith("+PTX") else arch + "-real" for arch in archs)


if __name__ == "__main__":
    try:
        toolkit = find_toolkit()
        archs = choose_archs(toolkit, sys.argv[1] if len(sys.argv) > 1 else "")
    except ToolkitError as error:
        sys.exit(f"cuda_toolkit.py: {error}")
    print(f"nvcc={toolkit.nvcc}")
    print(f"version={toolkit.version}")
    print(f"archs={','.join(archs)}")
    print(f"cmake_archs={cmake_archs(archs)}")
