"""Loads the compiled module ``ffr_ext._C`` once, on first use, and keeps the reason if that is impossible.

An install without the library is a supported way to run and stays quiet. A library that is there and cannot
be loaded (torch replaced by an older one, a copy that broke off) must not take ``import ffr_ext`` down with
it: one warning names the file and the loader's words, and the other backends serve.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import struct
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "ffr_ext._C"

# Written by setup.py: what was asked for, what was built, and a sentence for every part that was left out.
RECORD = Path(__file__).with_name("_build_record.json")


class NativeLibraryWarning(RuntimeWarning):
    """The native library is there but cannot be loaded; other backends are used instead."""


_lock = threading.Lock()
_tried = False
_module: ModuleType | None = None
_error: str | None = None


def native() -> ModuleType | None:
    """The compiled module, or None. Loading it registers the native ops.

    Tried once; the outcome is kept for the life of the process. If the library exists and cannot be loaded,
    the first call gives exactly one :class:`NativeLibraryWarning`.
    """
    if not _tried:
        _load()
    return _module


def native_error() -> str | None:
    """Why :func:`native` returned None, or None if it did not."""
    native()
    return _error


def build_record() -> dict[str, Any]:
    """What setup.py wrote about this install: ``build``, ``native``, ``cuda``, ``notes``; empty if it wrote
    nothing.
    """
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _load() -> None:
    global _tried, _module, _error
    with _lock:
        if _tried:
            return
        # Beside this file only: with two copies around, importlib would also find the other one's library.
        spec = importlib.machinery.PathFinder.find_spec(MODULE, [str(Path(__file__).parent)])
        file = spec.origin if spec is not None else None
        if file is None:
            _error = _why_absent()
        else:
            try:
                _refuse_truncated(Path(file))
                # torch first: the library has no search path of its own and finds libtorch's symbols in the
                # process.
                importlib.import_module("torch")
                _module = importlib.import_module(MODULE)
            except (ImportError, OSError) as error:
                _error = f"{file} cannot be loaded: {error}"
        _tried = True
    if file is not None and _error is not None:
        warnings.warn(
            f"{_error}. ffr_ext goes on without its native kernels. The usual cure is to install it again, "
            "which builds it for this Python and torch; `python -m ffr_ext info` says what serves meanwhile.",
            NativeLibraryWarning,
            stacklevel=3,
        )


def _refuse_truncated(file: Path) -> None:
    """Raise ImportError if a 64-bit ELF file is shorter than its own header says.

    The loader maps such a file without complaint and the process dies of SIGBUS while relocating it, so a
    copy that broke off or a full disk would take the whole program down. The section headers are the last
    thing in the file.
    """
    if not sys.platform.startswith("linux"):
        return
    with file.open("rb") as stream:
        header = stream.read(64)
        size = stream.seek(0, os.SEEK_END)
    if len(header) < 64:
        raise ImportError(f"file too short: {size} bytes are not a shared library")
    if header[:4] == b"\x7fELF" and header[4] == 2:  # 2 is ELFCLASS64
        order = "<" if header[5] == 1 else ">"
        (table,) = struct.unpack_from(order + "Q", header, 40)  # e_shoff
        entry, count = struct.unpack_from(order + "HH", header, 58)  # e_shentsize, e_shnum
        if size < table + entry * count:
            raise ImportError(f"file too short: {size} of {table + entry * count} bytes are there")


def _why_absent() -> str:
    libraries = sorted(
        p.name for p in Path(__file__).parent.glob("_C*") if p.suffix in (".so", ".pyd", ".dylib")
    )
    if libraries:
        needed = "_C" + importlib.machinery.EXTENSION_SUFFIXES[0]
        return (
            f"the native library is built for another Python: there is {', '.join(libraries)}, not {needed}"
        )
    record = build_record()
    if record.get("native"):
        return "the native library that this install was built with is gone"
    notes = record.get("notes") or []
    return "installed without the native library" + (": " + "; ".join(notes) if notes else "")
