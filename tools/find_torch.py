"""Where the torch of this environment keeps its headers and libraries, found without importing it.

CMake runs this file (``python tools/find_torch.py`` prints one ``name=value`` a line) and setup.py loads it.
Importing torch would cost seconds, and under pip's build isolation it is not importable at all: the isolated
environment hides site-packages from ``sys.path``, but ``sys.prefix`` is still the environment that pip
installs into.
"""

from __future__ import annotations

import importlib.util
import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Lists of tensors in ops (torch/csrc/stable) came with this version.
MINIMUM = (2, 10)


class TorchNotFound(Exception):
    """No torch that the native code can be built against."""


class Torch(NamedTuple):
    """A torch installation."""

    version: str
    cuda: str  # the CUDA version that it was built with, "" for a CPU build
    include: Path
    lib: Path


def find_torch() -> Torch:
    """The torch of this environment, or the one in the directory ``FFR_EXT_TORCH_DIR`` (the folder ``torch``
    itself).

    Raises TorchNotFound with a sentence that says where it looked, or which version it found.
    """
    looked = []
    for root in _candidates():
        if (root / "version.py").is_file() and (root / "include" / "torch" / "csrc").is_dir():
            return _describe(root)
        looked.append(str(root))
    raise TorchNotFound(
        f"no torch found (looked for {', '.join(dict.fromkeys(looked))}); "
        "install torch first, or name its folder in FFR_EXT_TORCH_DIR"
    )


def _candidates() -> Iterator[Path]:
    told = os.environ.get("FFR_EXT_TORCH_DIR")
    if told:
        yield Path(told)
        return
    spec = importlib.util.find_spec("torch")  # does not import it
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    for folder in folders:
        yield Path(folder) / "torch"


def _describe(root: Path) -> Torch:
    text = (root / "version.py").read_text(encoding="utf-8")
    version = _assigned(text, "__version__")
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise TorchNotFound(f"cannot read the version of the torch in {root}")
    if (int(match[1]), int(match[2])) < MINIMUM:
        least = ".".join(map(str, MINIMUM))
        raise TorchNotFound(f"torch {version} in {root} is too old, the native code needs {least} or newer")
    return Torch(version, _assigned(text, "cuda"), root / "include", root / "lib")


def _assigned(text: str, name: str) -> str:
    """The string assigned to ``name`` in version.py, "" for None; annotations (``cuda: Optional[str] = ...``)
    allowed.
    """
    match = re.search(rf"^{name}\s*(?::[^=\n]*)?=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return match[1] if match else ""


if __name__ == "__main__":
    try:
        for field, value in find_torch()._asdict().items():
            print(f"{field}={value}")
    except TorchNotFound as error:
        sys.exit(f"find_torch.py: {error}")
