"""What loading the package does: a library that is missing or broken costs one message at most, an import touches
nothing, and `info` says what is there.

Libraries that cannot be loaded need a process of their own: each of those tests runs a copy of the package.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

import ffr_ext
from ffr_ext import backends

PACKAGE = Path(ffr_ext.__file__).parent
LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


# ------------------------------------------------------------------------------------- processes of their own


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the Python part of the package, without a native library, in a directory that comes first on
    the path.
    """
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_record.json")
    return Path(shutil.copytree(PACKAGE, tmp_path / "site" / "ffr_ext", ignore=ignore))


def run(
    code: str, site: Path | None = None, *options: str, **environ: str
) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
    env.pop("TRITON_INTERPRET", None)
    if site is not None:
        env["PYTHONPATH"] = str(site)
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=env,
        cwd=site or PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


USE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    import ffr_ext
    from ffr_ext import backends, ffr_loss
    features = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(4)]
    loss, plain = ffr_loss(features), ffr_loss(features, backend="reference")
    loss.backward()
    backends.native(), backends.available()
ours = [str(w.message) for w in caught if issubclass(w.category, backends.NativeLibraryWarning)]
print(json.dumps({
    "file": ffr_ext.__file__, "error": backends.native_error(), "warnings": ours,
    "backend": backends.resolve("auto", "cpu"), "equal": bool(torch.allclose(loss, plain)),
}))
"""


def outcome(done: subprocess.CompletedProcess[str], site: Path) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["file"]).parent == site / "ffr_ext", "the test ran another copy of the package"
    assert result["equal"]
    return result


def test_an_install_without_the_library_is_quiet(package: Path) -> None:
    (package / "_build_record.json").write_text(
        json.dumps({"native": False, "notes": ["no C++ compiler found"]})
    )
    result = outcome(run(USE, package.parent), package.parent)
    assert result["backend"] == "reference"
    assert result["warnings"] == []
    assert result["error"] == "installed without the native library: no C++ compiler found"


def test_a_library_that_was_deleted_is_not_blamed_on_the_build(package: Path) -> None:
    (package / "_build_record.json").write_text(json.dumps({"native": True, "notes": ["no CUDA kernels"]}))
    result = outcome(run(USE, package.parent), package.parent)
    assert result["error"] == "the native library that this install was built with is gone"


def test_a_library_for_another_python_is_named(package: Path) -> None:
    (package / "_C.cpython-399-x86_64-linux-gnu.so").write_bytes(b"")
    result = outcome(run(USE, package.parent), package.parent)
    assert result["backend"] == "reference"
    assert "built for another Python: there is _C.cpython-399-x86_64-linux-gnu.so" in result["error"]


def _whole_library() -> bytes:
    file = PACKAGE / LIBRARY
    if not file.is_file():
        pytest.skip("needs the native library")
    return file.read_bytes()


def _undefined_symbol(folder: Path) -> bytes:
    """A library that needs a function which this torch does not have, as after a downgrade."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = folder / "broken.c"
    source.write_text(
        "int torch_function_of_the_future(void); int needs(void) { return torch_function_of_the_future(); }"
    )
    command = [compiler, "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(folder / "broken.so")]
    subprocess.run(command, check=True)
    return (folder / "broken.so").read_bytes()


BROKEN = {
    # what lies in the place of the library, and a word of the loader's about it
    "an empty file": (lambda folder: b"", "file too short"),
    "cut inside the header": (lambda folder: _whole_library()[:40], "file too short"),
    "cut in the middle": (
        lambda folder: _whole_library()[: len(_whole_library()) // 2],
        "file too short",
    ),  # SIGBUS in dlopen
    "the last byte missing": (lambda folder: _whole_library()[:-1], "file too short"),
    "not a library": (lambda folder: b"<!DOCTYPE html>" * 100, "invalid ELF header"),
    "made for a newer torch": (_undefined_symbol, "undefined symbol: torch_function_of_the_future"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the native library is built on Linux only")
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_library_gives_one_warning_with_file_and_cause(what: str, package: Path) -> None:
    content, cause = BROKEN[what]
    file = package / LIBRARY
    file.write_bytes(content(package.parent))
    result = outcome(run(USE, package.parent), package.parent)
    assert result["backend"] == "reference"
    (warning,) = result["warnings"]
    assert str(file) in warning
    assert cause in warning
    assert result["error"] in warning


IMPORT_TOUCHES_NOTHING = """
import sys
import torch

def forbidden(*args, **kwargs):
    raise AssertionError("import ffr_ext, or work on the CPU, asked for a device")

for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name", "init"):
    setattr(torch.cuda, name, forbidden)
loaded = set(sys.modules)
import ffr_ext
for name in ffr_ext.__all__:
    getattr(ffr_ext, name)
x = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(3)]
ffr_ext.ffr_loss(x).backward()
new = {module.split(".")[0] for module in set(sys.modules) - loaded}
assert "triton" not in new
print("fine")
"""


def test_import_touches_no_device_and_no_triton() -> None:
    done = run(IMPORT_TOUCHES_NOTHING)
    assert done.stdout.strip() == "fine", done.stderr


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import ffr_ext
from ffr_ext import FeatureFlow, backends, ffr_loss
for name in ("cpu", "reference"):
    if backends.available()[name].available:
        x = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(3)]
        ffr_loss(x, backend=name).backward()
ffr_ext.show_config()
"""


def test_everything_but_triton_works_without_triton() -> None:
    done = run(WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr
    assert re.search(r"triton +no +triton is not installed", done.stdout)


# ----------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def info() -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ffr_ext", "info"], capture_output=True, text=True, timeout=120
    )


def test_info_names_versions_and_every_backend_with_a_reason(info: subprocess.CompletedProcess[str]) -> None:
    assert info.returncode == 0, info.stderr
    assert f"ffr_ext   {ffr_ext.__version__}" in info.stdout
    assert f"torch     {torch.__version__}" in info.stdout
    assert re.search(r"^triton    \S+", info.stdout, re.MULTILINE)
    for name in backends.BACKENDS:
        assert re.search(rf"^{name} +(yes|no) +\w.{{10}}", info.stdout, re.MULTILINE), (
            f"no line with a reason for {name}"
        )


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently there")
def test_a_reader_that_has_read_enough_ends_the_program_quietly() -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "ffr_ext", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stderr is not None
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait(timeout=120) == 1


def test_info_as_json() -> None:
    from ffr_ext import env as config

    data = json.loads(json.dumps(config.collect()))
    assert data["ffr_ext"]["version"] == ffr_ext.__version__
    assert {name: state["available"] for name, state in data["backends"].items()} == {
        name: state.available for name, state in backends.available().items()
    }


def test_one_version_everywhere() -> None:
    assert importlib.metadata.version("ffr-ext") == ffr_ext.__version__
    module = backends.native()
    if module is not None:
        assert module.build_info()["version"] == ffr_ext.__version__


def test_build_info_says_what_was_compiled() -> None:
    module = backends.native()
    if module is None:
        pytest.skip(f"no native library: {backends.native_error()}")
    built = module.build_info()
    assert built["native"] is True
    assert re.match(r"(gcc|clang) \d+", built["compiler"])
    assert re.match(r"\d+\.\d+", built["torch_headers"])
    assert built["stable_abi"] == "2.10"
    assert built["cpu_isa"] in ("default", "avx2", "avx512")
    assert built["torch_has_cuda"] is (torch.version.cuda is not None)
    assert built["cuda"] is bool(built["cuda_archs"])
    assert built["cuda"] is (built["nvcc"] is not None)
