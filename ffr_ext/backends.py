"""Which implementations of the ops work in this process, why the others do not, and which one a call gets.

Nothing here runs at import: the native library is loaded by the first call that asks for it, Triton is looked
up without being imported, and no device is touched before somebody brings a CUDA tensor or asks for a report.
An explicit backend works or raises with the reason; only ``"auto"`` may fall back.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ._native import NativeLibraryWarning, build_record, native, native_error
from ._torch import constant_when_compiled

__all__ = [
    "BACKENDS",
    "BackendFallbackWarning",
    "NativeLibraryWarning",
    "Status",
    "available",
    "native",
    "native_error",
    "resolve",
]

BACKENDS = ("cuda", "triton", "cpu", "reference")

# The oldest NVIDIA GPU that Triton's documentation names as supported.
TRITON_MIN_CAPABILITY = (8, 0)


class Status(NamedTuple):
    """Whether a backend works in this process, and the sentence that says why or why not."""

    available: bool
    reason: str


class BackendFallbackWarning(RuntimeWarning):
    """``backend="auto"`` found no kernel for the tensors of an accelerator and computes in plain torch: correct, but
    slow. Given once for each device."""


def available() -> dict[str, Status]:
    """The state of every backend, best first. Loads the native library and asks for the GPUs."""
    return {name: _STATUS[name]() for name in BACKENDS}


_resolved: dict[tuple[str, torch.device | str], str] = {}


@constant_when_compiled  # it cannot trace the loading of a library
def resolve(backend: str, device: torch.device | str) -> str:
    """The concrete backend for tensors on ``device``. Each GPU is asked for itself: one that is too old for the
    kernels does not take them from the others.

    ``"auto"``: on ``cuda`` the first of cuda, triton, reference that works there; on ``cpu`` the first of cpu,
    reference; elsewhere reference. The answer is kept, so that a second call costs one dictionary look-up.

    Raises ValueError for an unknown name, or a backend that does not take tensors on that device;
    RuntimeError, with the reason, for an explicit backend that does not work there.
    """
    try:
        name = _resolved.get((backend, device))
    except TypeError:  # a list, say: no name, as `_resolve` says
        name = None
    if name is None:
        name = _resolve(backend, torch.device(device))
        _resolved[backend, device] = name
    return name


def _resolve(backend: str, device: torch.device) -> str:
    if backend == "auto":
        return _resolve_auto(device)
    if backend not in BACKENDS:
        valid = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend must be one of {valid}, got {backend!r}")
    takes = _devices_of(backend)
    if takes is not None and device.type not in takes:
        raise ValueError(
            f"backend={backend!r} takes tensors on {' or '.join(takes)}, got tensors on {device.type}"
            + ("; TRITON_INTERPRET=1 runs Triton's kernels on cpu tensors" if backend == "triton" else "")
        )
    status = _status_on(backend, device)
    if not status.available:
        raise RuntimeError(f"backend={backend!r} is not available: {status.reason}")
    return backend


def _resolve_auto(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu" if native() is not None else "reference"
    if device.type == "meta":
        return "reference"
    if device.type != "cuda":
        _warn_of_fallback(device, "its kernels are for CPUs and for CUDA")
        return "reference"
    reasons = []
    for name in ("cuda", "triton"):
        status = _status_on(name, device)
        if status.available:
            return name
        reasons.append(f"{name}: {status.reason}")
    _warn_of_fallback(device, "; ".join(reasons))
    return "reference"


def _warn_of_fallback(device: torch.device, why: str) -> None:
    warnings.warn(
        f"no ffr_ext kernel serves tensors on {device}, plain torch does (backend='reference'). {why}",
        BackendFallbackWarning,
        stacklevel=5,
    )


def _status_on(backend: str, device: torch.device) -> Status:
    """Whether a backend works for tensors of that device."""
    status = _STATUS[backend]()
    if not status.available or device.type != "cuda" or backend not in _REFUSES:
        return status
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = _REFUSES[backend](index)
    return Status(False, reason) if reason else status


def _devices_of(backend: str) -> tuple[str, ...] | None:
    """The device types whose tensors a backend takes; None for all."""
    if backend == "reference":
        return None
    if backend == "triton":
        return ("cuda", "cpu") if _triton_interprets() else ("cuda",)
    return (backend,)


# ------------------------------------------------------------------------------------------------------------
# One function per backend that says whether it works
# ------------------------------------------------------------------------------------------------------------


def _reference_status() -> Status:
    return Status(True, f"plain torch {torch.__version__}, on any device")


def _cpu_status() -> Status:
    module = native()
    if module is None:
        return Status(False, native_error() or "")
    return Status(True, f"C++ kernels, {module.build_info()['cpu_isa']} code on this machine")


def _cuda_status() -> Status:
    missing = _no_gpu("cuda")
    if missing:
        return Status(False, missing)
    if torch.version.hip:
        return Status(
            False, f"torch {torch.__version__} is built for ROCm; the CUDA kernels need NVIDIA's CUDA"
        )
    module = native()
    if module is None:
        return Status(False, native_error() or "")
    info = module.build_info()
    if not info["cuda"]:
        notes = build_record().get("notes") or []
        return Status(
            False, "the native library is built without CUDA kernels" + "".join(f"; {n}" for n in notes)
        )
    if not info["torch_has_cuda"]:
        return Status(False, "the native library does not find the CUDA part of libtorch")
    archs = ", ".join(info["cuda_archs"])
    return _if_any_gpu(_cuda_refuses, f"CUDA kernels for {archs} (nvcc {info['nvcc']})")


def _cuda_refuses(index: int) -> str | None:
    """Why the CUDA kernels do not run on a GPU, or None."""
    module = native()
    archs, capability = module.build_info()["cuda_archs"] if module else [], _capability(index)
    if covers(archs, capability):
        return None
    return (
        f"cuda:{index} has compute capability {_dotted(capability)}, the kernels are for {', '.join(archs)}"
    )


def _triton_status() -> Status:
    if not _importable("triton"):
        return Status(False, "triton is not installed")
    if _triton_interprets():
        return Status(True, "Triton kernels in Triton's interpreter (TRITON_INTERPRET=1), for tests")
    missing = _no_gpu("triton")
    if missing:
        return Status(False, missing)
    if torch.version.hip:
        return Status(
            True, "Triton kernels for ROCm, compiled on first use; they have not been run on an AMD GPU"
        )
    return _if_any_gpu(_triton_refuses, "Triton kernels, compiled on first use")


def _triton_refuses(index: int) -> str | None:
    """Why Triton's kernels do not run on a GPU, or None."""
    if torch.version.hip or _capability(index) >= TRITON_MIN_CAPABILITY:
        return None
    least = _dotted(TRITON_MIN_CAPABILITY)
    return f"cuda:{index} has compute capability {_dotted(_capability(index))}, Triton needs {least}"


def _if_any_gpu(refuses: Callable[[int], str | None], what: str) -> Status:
    """Available if one of the visible GPUs takes the kernels; the reason names those that do not."""
    reasons = [refuses(index) for index in range(torch.cuda.device_count())]
    refused = [reason for reason in reasons if reason]
    if len(refused) == len(reasons):
        return Status(False, "; ".join(refused))
    return Status(True, "; but ".join([what, *refused]))


_STATUS: dict[str, Callable[[], Status]] = {
    "cuda": _cuda_status,
    "triton": _triton_status,
    "cpu": _cpu_status,
    "reference": _reference_status,
}

# For the backends that may work on some GPUs of a machine alone.
_REFUSES: dict[str, Callable[[int], str | None]] = {"cuda": _cuda_refuses, "triton": _triton_refuses}


def _no_gpu(backend: str) -> str | None:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without GPU support"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no GPU, no driver, or none visible to this process"
    return None


def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether kernels built for ``archs`` run on a GPU of that compute capability.

    ``"90"`` is machine code: it runs on the same major version from that minor version up. ``"90a"`` runs on
    exactly that version. ``"120+PTX"`` also carries PTX, which the driver compiles for anything newer.
    """
    for arch in archs:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        built = (int(match[1]), int(match[2]))
        exact = match[3] == "a"
        if capability == built:
            return True
        if not exact and capability[0] == built[0] and capability >= built:
            return True
        if not exact and match[4] and capability >= built:
            return True
    return False


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _importable(name: str) -> bool:
    """Whether ``import name`` would find a module, without importing it: Triton's import takes its time."""
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def _triton_interprets() -> bool:
    # Triton reads the variable when a kernel is decorated and takes these words for "yes".
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "on", "true")
