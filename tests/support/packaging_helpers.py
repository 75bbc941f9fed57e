"""Builds of the package in copies of the source tree, so that no test touches the tree it runs from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def copy_tree(to: Path) -> Path:
    """The sources without what git ignores: builds, environments, results."""
    ignore = shutil.ignore_patterns(
        ".git",
        ".venv",
        "build",
        "dist",
        "runs",
        "*.so",
        "*.egg-info",
        "__pycache__",
        "_build_record.json",
        ".*_cache",
    )
    return Path(shutil.copytree(ROOT, to, ignore=ignore))


def pip_wheel(source: Path, out: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """``pip wheel`` with the tools of this environment and no index: a download would be an error."""
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("FFR_EXT_", "PIP_", "CUDA"))
    }
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environ}
    options = ["-v", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=550)


class Wheel:
    """A built wheel's content."""

    def __init__(self, folder: Path) -> None:
        (self.path,) = folder.glob("*.whl")
        with zipfile.ZipFile(self.path) as archive:
            self.names = archive.namelist()
            (info,) = {name.split("/")[0] for name in self.names if ".dist-info/" in name}
            self.metadata: Message = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
            self.tags = Parser().parsestr(archive.read(f"{info}/WHEEL").decode()).get_all("Tag", [])
            self.record: dict[str, Any] = json.loads(archive.read("ffr_ext/_build_record.json"))

    @property
    def libraries(self) -> list[str]:
        return [name for name in self.names if name.startswith("ffr_ext/_C")]


def must(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, (
        f"{done.args} returned {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
    )
    return done


def build_sdist(source: Path, out: Path) -> Path:
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    out.mkdir(exist_ok=True)
    must(
        subprocess.run(
            [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, timeout=120
        )
    )
    (archive,) = out.glob("*.tar.gz")
    return archive
