"""What this installation is made of, which backends work, and why the others do not: the first thing a bug
report needs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from . import __version__, backends
from ._native import build_record


def show_config(file: TextIO | None = None) -> None:
    """Print the versions, the native library, the devices and the state of every backend to ``file``
    (stdout).

    The same as ``python -m ffr_ext info``. ``ffr_ext.env.collect()`` returns it as a dictionary.
    """
    print(_text(collect()), file=file)


def collect() -> dict[str, Any]:
    """The content of :func:`show_config`, in types that JSON has. Loads the native library and asks for the
    GPUs.
    """
    module = backends.native()
    native: dict[str, Any] = {"file": None, "error": backends.native_error(), "installed": build_record()}
    if module is not None:
        native.update(module.build_info(), file=module.__file__)
    return {
        "ffr_ext": {"version": __version__, "directory": str(Path(__file__).parent)},
        "python": {
            "version": platform.python_version(),
            "executable": sys.executable,
            "platform": platform.platform(),
        },
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "threads": torch.get_num_threads(),
        },
        "triton": {
            "version": _version_of("triton", "pytorch-triton"),
            "interpret": os.environ.get("TRITON_INTERPRET"),
        },
        "gpus": _gpus(),
        "accelerator": _other_accelerator(),
        "native": native,
        "backends": {name: status._asdict() for name, status in backends.available().items()},
    }


def _version_of(*distributions: str) -> str | None:
    """The installed version of the first of these distributions, without importing it."""
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return gpus


def _other_accelerator() -> str | None:
    """The accelerator of this torch that is no `cuda` device (which ROCm's are too), for which there are no
    kernels."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if device is None or device.type == "cuda" else device.type


def _text(config: dict[str, Any]) -> str:
    torch_, triton, native = config["torch"], config["triton"], config["native"]
    gpu_build = (
        f"CUDA {torch_['cuda']}"
        if torch_["cuda"]
        else f"ROCm {torch_['hip']}"
        if torch_["hip"]
        else "CPU only"
    )
    rows = [
        ("ffr_ext", f"{config['ffr_ext']['version']} in {config['ffr_ext']['directory']}"),
        ("python", f"{config['python']['version']} on {config['python']['platform']}"),
        ("torch", f"{torch_['version']} ({gpu_build}, {torch_['threads']} threads)"),
        ("triton", triton["version"] or "not installed"),
    ]
    if triton["interpret"]:
        rows.append(("", f"TRITON_INTERPRET={triton['interpret']}"))
    for index, gpu in enumerate(config["gpus"]):
        rows.append(
            (
                f"cuda:{index}",
                f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB",
            )
        )
    if config["accelerator"]:
        rows.append((config["accelerator"], "no kernels of ffr_ext for it: plain torch serves (reference)"))
    elif not config["gpus"]:
        rows.append(("gpu", "none"))
    if native["error"]:
        rows.append(("native", native["error"]))
    else:
        cuda = f"nvcc {native['nvcc']} for {', '.join(native['cuda_archs'])}" if native["cuda"] else "no CUDA"
        rows.append(("native", native["file"]))
        rows.append(("", f"{native['compiler']}, {cuda}, torch {native['torch_headers']} headers"))
        rows.append(("", f"runs with torch {native['stable_abi']} and newer"))
    rows += [("", f"left out at installation: {note}") for note in native["installed"].get("notes", [])]
    lines = [f"{label:<8}  {text}".rstrip() for label, text in rows]

    lines += ["", "backend    works  because"]
    for name, status in config["backends"].items():
        lines.append(f"{name:<9}  {'yes' if status['available'] else 'no ':<5}  {status['reason']}")
    return "\n".join(lines)
