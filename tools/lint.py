"""``make lint`` and ``make format``: ruff, mypy and clang-format over the sources of this repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NATIVE = sorted(
    str(p.relative_to(ROOT))
    for p in (ROOT / "csrc").rglob("*")
    if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".inc"}
)


def tool(name: str) -> str:
    """The program beside this Python, so that the pinned version runs and no other."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        sys.exit(f"lint: no {name} found; `make lint` installs it")
    return found


def main() -> int:
    if sys.argv[1:] == ["--fix"]:
        commands = [
            [tool("ruff"), "check", "--fix", "."],
            [tool("ruff"), "format", "."],
            [tool("clang-format"), "-i", *NATIVE],
        ]
    else:
        commands = [
            [tool("ruff"), "check", "."],
            [tool("ruff"), "format", "--check", "."],
            [tool("clang-format"), "--dry-run", "-Werror", *NATIVE],
            [sys.executable, "-m", "mypy"],
        ]
    failed = [command[:2] for command in commands if subprocess.run(command, cwd=ROOT).returncode != 0]
    for command in failed:
        print(f"lint: {Path(command[0]).name} {command[1]} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
