"""Machine code without a GPU: what the Triton launchers would compile, and what a cubin says about itself."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


class Resources(NamedTuple):
    """Of one kernel, per thread (shared: per block), as `cuobjdump --dump-resource-usage` reports them."""

    registers: int
    stack: int  # bytes of local memory the ABI reserves: arrays indexed at run time, calls
    local: int
    shared: int


def cuobjdump() -> str | None:
    """The disassembler of the CUDA toolkit, or the one in Triton's wheel."""
    try:
        import triton

        packaged = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if packaged.exists():
            return str(packaged)
    except ImportError:
        pass
    return shutil.which("cuobjdump")


def _dump(cubin: Path, what: str) -> str:
    command = [cuobjdump() or "cuobjdump", what, str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(cubin: Path) -> dict[str, Resources]:
    """Resource usage of every kernel of a cubin, by its (mangled) name."""
    report = _dump(cubin, "--dump-resource-usage")
    found = {}
    for name, usage in re.findall(r"Function (\S+?):\s+(REG:.*)", report):
        number = dict(re.findall(r"([A-Z]+):(\d+)", usage))
        found[name] = Resources(
            int(number["REG"]), int(number["STACK"]), int(number["LOCAL"]), int(number["SHARED"])
        )
    return found


def instructions(cubin: Path) -> dict[str, list[str]]:
    """The instructions of every kernel of a cubin with their modifiers (LDG.E.128), in program order."""
    found: dict[str, list[str]] = {}
    for part in _dump(cubin, "--dump-sass").split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", part)
    return found


def widths(code: list[str], kind: str) -> list[int]:
    """Bits of every global load (LDG) or store (STG)."""
    found = []
    for instruction in code:
        if instruction.split(".")[0] == kind:
            width = re.search(r"\.(U?8|U?16|S8|S16|64|128)\b", instruction)
            found.append(int(width[1].strip("US")) if width else 32)
    return found


@contextmanager
def recorded_launches() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Inside, a Triton kernel that is launched is only noted down, with its arguments: (kernel, args,
    kwargs).
    """
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    run: Callable[..., Any] = JITFunction.run
    JITFunction.run = note  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _bind(launch: Launch, backend: Any) -> tuple[Any, Any, Any]:
    """What Triton's own binder makes of the arguments."""
    from triton.runtime.jit import create_function_from_signature

    kernel, args, kwargs = launch
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    return bound, specialization, options


def _backend(arch: int | str) -> tuple[Any, Any]:
    """For a compute capability, or for an AMD GPU such as gfx942, whose warps have 64 lanes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return target, make_backend(target)


def specialization(launch: Launch, arch: int = 90) -> str:
    """What a recorded launch would be compiled for: equal for two launches that share a kernel."""
    _, specialized, options = _bind(launch, _backend(arch)[1])
    return f"{launch[0].__name__} {specialized} {options}"


def compile_launch(launch: Launch, arch: int | str) -> Any:
    """Compiles what a recorded launch would have compiled, for sm_`arch` or an AMD GPU."""
    import triton
    from triton.compiler import ASTSource

    target, backend = _backend(arch)
    bound, specialized, options = _bind(launch, backend)
    kernel, _, kwargs = launch
    parsed, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialized, options)
    source = ASTSource(kernel, signature, constexprs, attrs)
    return triton.compile(source, target=target, options=parsed.__dict__)
