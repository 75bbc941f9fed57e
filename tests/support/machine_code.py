"""Machine code without a GPU: what the Triton launchers would compile, and what a cubin says about itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from sass import Instruction, cuobjdump, listings, resources  # noqa: E402


class Kernel(NamedTuple):
    name: str
    registers: int
    stack: int
    local: int
    code: list[Instruction]

    @classmethod
    def all_of(cls, cubin: Path) -> list[Kernel]:
        code = listings(cubin)
        return [cls(name, r.registers, r.stack, r.local, code[name]) for name, r in resources(cubin).items()]

    def assert_no_slow_memory(self) -> None:
        assert self.stack == 0, f"{self.name}: {self.stack} bytes of stack"
        assert self.local == 0, f"{self.name}: {self.local} bytes of local memory"
        spilled = [i for i in self.code if i.kind in ("LDL", "STL")]
        assert not spilled, f"{self.name}: {len(spilled)} accesses to local memory"

    def widths(self, kind: str) -> list[int]:
        """Bits of every global load (LDG) or store (STG)."""
        return [i.width for i in self.code if i.kind == kind]


needs_cuobjdump = pytest.mark.skipif(
    cuobjdump() is None, reason="no cuobjdump: neither a CUDA toolkit nor Triton"
)


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
