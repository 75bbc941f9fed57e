"""Builds a wheel for other machines: `make wheel`, or `python tools/make_wheel.py [FOLDER]` (default: dist).

The native module links the libraries of the user's torch, which stay out of the wheel; auditwheel checks that it needs
nothing else, and names the oldest glibc that it runs with. FFR_EXT_BUILD and FFR_EXT_CUDA_ARCHS as for any build.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What `import torch` has loaded before the module is. libcuda comes with the driver.
OF_TORCH = (
    "libtorch.so",
    "libtorch_cpu.so",
    "libtorch_cuda.so",
    "libc10.so",
    "libc10_cuda.so",
    "libcuda.so.1",
)


def main(folder: Path) -> Path:
    """Build the wheel, put it into the folder and say where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    environment.setdefault("FFR_EXT_BUILD", "cpu")  # a missing tool is an error here
    with tempfile.TemporaryDirectory() as raw:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
        run(
            [*pip, "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", raw, str(ROOT)], environment
        )
        (built,) = Path(raw).glob("*.whl")
        exclude = [option for library in OF_TORCH for option in ("--exclude", library)]
        command = [
            sys.executable,
            "-m",
            "auditwheel",
            "repair",
            *exclude,
            "--wheel-dir",
            str(folder),
            str(built),
        ]
        run(command, environment)
    return max(folder.glob("ffr_ext-*manylinux*.whl"), key=lambda wheel: wheel.stat().st_mtime)


def run(command: list[str], environment: dict[str, str]) -> None:
    """Run it; its output is shown if it fails, which ends this program."""
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout}\n{' '.join(command[:5])} ... failed")


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist")))
