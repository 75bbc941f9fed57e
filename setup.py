"""Builds ffr_ext: the Python package, and the native module through CMake where the tools for it are there.

What is built is decided by FFR_EXT_BUILD (auto, cpu, cuda or off), see docs/install.md. A tool that is missing makes
``auto`` leave the native part out and say so; an error of CMake or a compiler stops the install, whatever was asked.
torch is not imported, and is no build requirement: pip would fetch a second one, gigabytes large, to build against.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "off")
LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
GIB = 1 << 30


def load_tool(name: str) -> ModuleType:
    """A file of tools/ as a module; tools/ is no package and not on the path."""
    spec = importlib.util.spec_from_file_location(f"ffr_ext_tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


find_torch = load_tool("find_torch")
cuda_toolkit = load_tool("cuda_toolkit")


# --------------------------------------------------------------------------------------------------------------------
# What to build
# --------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What this install builds, and a sentence for every part that it leaves out."""

    mode: str
    native: bool
    cuda: bool
    notes: list[str]


def make_plan(mode: str) -> Plan:
    """Looks for the tools. Raises SystemExit with a sentence where ``mode`` requires what cannot be had."""
    if mode not in MODES:
        raise SystemExit(f"FFR_EXT_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "off":
        return Plan(mode, False, False, ["FFR_EXT_BUILD=off asked for no native code"])

    missing = missing_tools()
    if missing:
        if mode != "auto":
            raise SystemExit(f"FFR_EXT_BUILD={mode} cannot be built: {'; '.join(missing)}")
        return Plan(mode, False, False, missing)
    if mode == "cpu":
        return Plan(mode, True, False, ["FFR_EXT_BUILD=cpu asked for no CUDA kernels"])

    reason = no_cuda(mode)
    if reason and mode == "cuda":
        raise SystemExit(f"FFR_EXT_BUILD=cuda cannot be built: {reason}")
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
        missing.append(f"no Python.h in {sysconfig.get_path('include')} (on Debian and Ubuntu: package python3-dev)")
    try:
        find_torch.find_torch()
    except find_torch.TorchNotFound as error:
        missing.append(str(error))
    return missing


def no_cuda(mode: str) -> str:
    """Why no CUDA kernels are built, "" if they are."""
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
            f"no CUDA kernels: torch is built for CUDA {torch_cuda}, {toolkit.nvcc} is CUDA {toolkit.version} "
            "(FFR_EXT_BUILD=cuda builds them all the same)"
        )
    return ""


def find_cxx() -> str | None:
    told = os.environ.get("CXX")
    for name in told.split()[:1] if told else ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return found
    return None


def find_program(name: str) -> str | None:
    """On PATH, beside the running Python, or from the wheel of that name (cmake, ninja): pip may run with a bare PATH."""
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


# --------------------------------------------------------------------------------------------------------------------
# Building it
# --------------------------------------------------------------------------------------------------------------------


class CMakeBuild(build_ext):
    """Builds the one extension module with CMake and Ninja and puts it where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        # In the tree, not in setuptools' temporary folder: the next editable install compiles only what changed.
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        with locked(build_dir.with_suffix(".lock")):
            self.configure(build_dir)
            run(str(find_program("cmake")), "--build", str(build_dir), "--target", "_C", "--parallel", str(jobs()))
            built = build_dir / LIBRARY
            install_file(built, Path(self.get_ext_fullpath(ext.name)))
            if self.inplace:
                install_file(built, ROOT / "ffr_ext" / LIBRARY)

    def copy_extensions_to_source(self) -> None:
        """Done above for an editable install: setuptools' own copy leaves a moment without a whole library."""

    def configure(self, build_dir: Path) -> None:
        import pybind11

        command = [
            str(find_program("cmake")), "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={find_program('ninja')}",
            f"-DCMAKE_CXX_COMPILER={find_cxx()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFFR_EXT_VERSION={self.distribution.get_version()}",
            f"-DFFR_EXT_CUDA={'ON' if PLAN.cuda else 'OFF'}",
            f"-DFFR_EXT_CUDA_ARCHS={os.environ.get('FFR_EXT_CUDA_ARCHS', '')}",
        ]  # fmt: skip
        if (build_dir / "CMakeCache.txt").is_file():
            # A cache left by another compiler, another path of this tree or a removed environment: start afresh, once.
            if subprocess.run(command).returncode == 0:
                return
            shutil.rmtree(build_dir)
        run(*command)


class BuildPy(build_py):
    """Also leaves a record of what was built and why the rest was not: pip shows none of a build's output."""

    def run(self) -> None:
        editable = bool(getattr(self, "editable_mode", False))
        if not editable:
            # setuptools never removes what an earlier build left here, so a deleted module would be packed again.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        package = ROOT / "ffr_ext" if editable else Path(self.build_lib) / "ffr_ext"
        package.mkdir(parents=True, exist_ok=True)
        record = {"build": PLAN.mode, "native": PLAN.native, "cuda": PLAN.cuda, "notes": PLAN.notes}
        (package / "_build_record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if editable and not PLAN.native:
            (package / LIBRARY).unlink(missing_ok=True)


def run(*command: str) -> None:
    """Runs a build step; its failure ends the install. Never optional: a compile error must not pass as pure Python."""
    print("ffr_ext:", " ".join(command), flush=True)
    code = subprocess.run(command).returncode
    if code != 0:
        raise SystemExit(
            f"ffr_ext: building the native code failed ({command[0]} returned {code}, its output is above). "
            "FFR_EXT_BUILD=off installs the package without it."
        )


def jobs() -> int:
    """MAX_JOBS, else one compiler per core, but no more than one for every 2 GiB of memory."""
    told = os.environ.get("MAX_JOBS")
    if told:
        return max(1, int(told))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // (2 * GIB)))


def install_file(source: Path, target: Path) -> None:
    """Copies in one step: a process that has the old library mapped keeps it, instead of dying of half a new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part{os.getpid()}")
    shutil.copy2(source, part)
    part.replace(target)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One build of a tree at a time."""
    import fcntl  # not on Windows, where no native code is built

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


PLAN = make_plan(os.environ.get("FFR_EXT_BUILD", "auto"))
for note in PLAN.notes:
    print(f"ffr_ext: {note}", file=sys.stderr)

setup(
    license="Apache-2.0",
    ext_modules=[Extension("ffr_ext._C", sources=[])] if PLAN.native else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
