"""What a cubin says about its kernels: registers, and the machine code in the order of its listing.

Read with cuobjdump, of the CUDA toolkit or of Triton's wheel; no GPU is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple


class Resources(NamedTuple):
    """Of one kernel, per thread (shared: per block), as `cuobjdump --dump-resource-usage` reports them."""

    registers: int
    stack: int  # bytes of local memory the ABI reserves: arrays indexed at run time, calls
    local: int
    shared: int


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate under which it runs, "@!P0", or nothing
    name: str  # with modifiers: LDG.E.128
    operands: str

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bits of a load or store."""
        found = re.search(r"\.(U?8|U?16|S8|S16|64|128)\b", self.name)
        return int(found[1].strip("US")) if found else 32

    @property
    def loaded(self) -> set[int]:
        """The registers that a load fills."""
        first = re.match(r"R(\d+)", self.operands)
        return set(range(int(first[1]), int(first[1]) + max(self.width // 32, 1))) if first else set()

    @property
    def registers(self) -> set[int]:
        """Those that must be there, and those that are overwritten; of a load only the former."""
        operands = self.operands.partition(",")[2] if self.kind == "LDG" else self.operands
        return {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.kind == "BRA" else None
        return int(found[1], 16) if found else None


Code = Sequence[Instruction]


class FlowKernel(NamedTuple):
    """Of which template of csrc/cuda/flow_*.cu a kernel is an instance."""

    template: str  # forward, backward or gradient
    dtype: str
    reads: str  # signs or squares; of the forward kernel also sums, which are all it makes

    @classmethod
    def of(cls, mangled: str) -> FlowKernel | None:
        match = re.search(
            r"(forward|backward|gradient)_kernelI(?:NS_\d)?(d|f|BFloat16|Float16)E?L(?:NS\d_4ModeE|b)(\d)",
            mangled,
        )
        if match is None:
            return None
        kinds = ("sums", "signs", "squares") if match[1] == "forward" else ("signs", "squares")
        dtypes = {"d": "fp64", "f": "fp32", "BFloat16": "bf16", "Float16": "fp16"}
        return cls(match[1], dtypes[match[2]], kinds[int(match[3])])


def cuobjdump() -> str | None:
    """The disassembler in Triton's wheel, or the one of the CUDA toolkit."""
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


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)\s*([^;]*);")


def listings(cubin: Path) -> dict[str, list[Instruction]]:
    """The instructions of every kernel of a cubin, in program order."""
    return {
        part.split(maxsplit=1)[0]: [
            Instruction(int(address, 16), guard.strip(), name, operands.strip())
            for address, guard, name, operands in _LINE.findall(part)
        ]
        for part in _dump(cubin, "--dump-sass").split("Function : ")[1:]
    }


def wide(code: Code, kind: str) -> list[Instruction]:
    """The loads (LDG) or stores (STG) of 16 bytes."""
    return [i for i in code if i.kind == kind and i.width == 128]


def loops(code: Code) -> Iterator[Code]:
    """Innermost loops: from the target of a branch that goes back to that branch."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    found = [
        (places[i.target], place + 1)
        for place, i in enumerate(code)
        if i.target is not None and i.target < i.address
    ]
    for begin, end in found:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in found):
            yield code[begin:end]


def instructions_until_used(loop: Code) -> list[int]:
    """For each 16-byte load of a loop, the instructions from it to the first that needs it, going round."""
    distances = []
    for load in wide(loop, "LDG"):
        place = loop.index(load)
        behind = [*loop[place + 1 :], *loop[: place + 1]]
        distances.append(1 + next(i for i, other in enumerate(behind) if other.registers & load.loaded))
    return distances


def path_to(code: Code, last: Instruction) -> Code:
    """What runs before `last` since the code was last left, joined or stored in, and `last`."""
    end = code.index(last)
    begin = end
    while begin > 0:
        before = code[begin - 1]
        if before.kind in ("EXIT", "STG", "BAR") or (before.name == "BRA" and not before.guard):
            break
        begin -= 1
    return code[begin : end + 1]


def round_trips(path: Code) -> int:
    """How often in a row a thread waits for memory: loads that are under way together count once."""
    trips, waited_for = 0, set[int]()
    for instruction in path:
        if instruction.registers & waited_for:
            trips += 1
            waited_for = set()
        if instruction.kind == "LDG":
            waited_for |= instruction.loaded
    return trips
