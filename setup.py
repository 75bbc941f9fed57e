"""Builds ffr_ext: the Python package, and the native module through CMake where the tools for it are there.

What is built is decided by FFR_EXT_BUILD (auto, cpu, cuda or off), see docs/install.md. A tool that is
missing makes ``auto`` leave the native part out and say so; an error of CMake or a compiler stops the
install, whatever was asked. torch is not imported, and is no build requirement: pip would fetch a second one,
gigabytes large, to build against.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))  # pip runs this file without its directory on the path

from build_plan import BuildError, find_cxx, find_program, make_plan  # noqa: E402

LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
GIB = 1 << 30


class CMakeBuild(build_ext):
    """Builds the one extension module with CMake and Ninja and puts it where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        # In the tree, not in setuptools' temporary folder: the next editable install compiles only what
        # changed.
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        with locked(build_dir.with_suffix(".lock")):
            self.configure(build_dir)
            run(
                str(find_program("cmake")),
                "--build",
                str(build_dir),
                "--target",
                "_C",
                "--parallel",
                str(jobs()),
            )
            install_file(build_dir / LIBRARY, Path(self.get_ext_fullpath(ext.name)))

    def copy_extensions_to_source(self) -> None:
        """For an editable install. setuptools' own copy leaves a moment without a whole library."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name))
            install_file(built, ROOT / "ffr_ext" / LIBRARY)

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
            # A cache left by another compiler, another path of this tree or a removed environment: start
            # afresh, once.
            if subprocess.run(command).returncode == 0:
                return
            shutil.rmtree(build_dir)
        run(*command)


class BuildPy(build_py):
    """Also leaves a record of what was built and why the rest was not: pip shows none of a build's output."""

    def run(self) -> None:
        editable = bool(getattr(self, "editable_mode", False))
        if not editable:
            # setuptools never removes what an earlier build left here, so a deleted module would be packed
            # again.
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        package = ROOT / "ffr_ext" if editable else Path(self.build_lib) / "ffr_ext"
        package.mkdir(parents=True, exist_ok=True)
        record = {"build": PLAN.mode, "native": PLAN.native, "cuda": PLAN.cuda, "notes": PLAN.notes}
        (package / "_build_record.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if editable and not PLAN.native:
            (package / LIBRARY).unlink(missing_ok=True)


def run(*command: str) -> None:
    """Runs a build step; its failure ends the install. Never optional: a compile error must not pass as pure
    Python.
    """
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
    """Copies in one step: a process that has the old library mapped keeps it, instead of dying of half a new
    one.
    """
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


NEEDS_WHEEL = {"dist_info", "bdist_wheel", "editable_wheel"}
if NEEDS_WHEEL.intersection(sys.argv) and not (
    importlib.util.find_spec("setuptools.command.bdist_wheel") or importlib.util.find_spec("wheel")
):
    raise SystemExit(
        f"ffr_ext: without build isolation setuptools {setuptools.__version__} needs the package wheel to make one; "
        "setuptools 70.1 and newer do not: pip install -U setuptools"
    )

try:
    PLAN = make_plan(os.environ.get("FFR_EXT_BUILD", "auto"))
except BuildError as error:
    raise SystemExit(f"ffr_ext: {error}") from None
for note in PLAN.notes:
    print(f"ffr_ext: {note}", file=sys.stderr)

setup(
    license="Apache-2.0",
    ext_modules=[Extension("ffr_ext._C", sources=[])] if PLAN.native else [],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPy},
)
