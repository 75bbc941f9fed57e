"""The CUDA kernels' sources, compiled for the CPU with gcc's address and undefined-behaviour sanitizers: a read or
write outside of a tensor, of shared memory or of an array of the host's side ends the process.

The sanitizers have to be in the process before everything else, so the tests of `test_cuda_on_cpu.py` run once more in
one of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_cuda import SANITIZED, compiler

# libstdc++ too: the sanitizer looks for its exceptions when it starts, before torch brings it.
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")


def preloaded() -> str:
    """The sanitizers' libraries, or a skip where the compiler has none."""
    if compiler() is None:
        pytest.skip("no C++ compiler")
    found = []
    for name in LIBRARIES:
        command = [str(compiler()), f"-print-file-name={name}"]
        found.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    missing = [path for path in found if not Path(path).is_absolute()]
    if missing:
        pytest.skip(f"this compiler has no {', '.join(missing)}")
    return " ".join(found)


@pytest.mark.slow
def test_the_emulated_cuda_kernels_touch_no_memory_that_is_not_theirs() -> None:
    tests = Path(__file__).with_name("test_cuda_on_cpu.py")
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(tests)]
    environment = {
        **os.environ,
        "LD_PRELOAD": preloaded(),
        SANITIZED: "1",
        # Python and torch leak by design; the kernels' threads are fibers with stacks of their own.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-4000:]
