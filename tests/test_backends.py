"""Which backend a call gets, what stands in the way of the others, and that asking at the wrong time costs
nothing.

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
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import ffr_ext
from ffr_ext import backends

PACKAGE = Path(ffr_ext.__file__).parent
LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


# ----------------------------------------------------------------------------------------------------- choice


@pytest.fixture(autouse=True)
def _no_remembered_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_resolved", {})


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``works("cuda", "triton")``: from now on exactly these backends (and reference) are available."""

    def set_available(*names: str) -> None:
        for name in ("cuda", "triton", "cpu"):
            status = backends.Status(name in names, f"{name} says so")
            monkeypatch.setitem(backends._STATUS, name, lambda status=status: status)
        monkeypatch.setattr(backends, "native", lambda: types.ModuleType("_C") if "cpu" in names else None)

    return set_available


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        ("cuda", ("cuda", "triton", "cpu"), "cuda"),  # compiled kernels need no first-call compilation
        ("cuda", ("triton", "cpu"), "triton"),  # no nvcc at installation
        ("cpu", ("cuda", "triton", "cpu"), "cpu"),
        ("cpu", ("cuda", "triton"), "reference"),  # Triton on CPU tensors is an interpreter: never by itself
        ("mps", ("cuda", "triton", "cpu"), "reference"),  # any other device
        ("meta", ("cuda", "triton", "cpu"), "reference"),
    ],
)
def test_auto_takes_the_best_backend_for_the_device(
    works: Any, device: str, available: Any, chosen: str
) -> None:
    works(*available)
    assert backends.resolve("auto", device) == chosen


def test_auto_without_any_cuda_kernel_says_so_once(works: Any) -> None:
    works("cpu")
    with pytest.warns(backends.BackendFallbackWarning, match=r"cuda says so.*triton says so"):
        assert backends.resolve("auto", "cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", "cuda") == "reference"


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_an_explicit_backend_works_or_raises_its_reason(works: Any, name: str) -> None:
    device = "cpu" if name == "cpu" else "cuda"
    works(name)
    assert backends.resolve(name, device) == name
    if name != "reference":
        backends._resolved.clear()
        works()
        with pytest.raises(RuntimeError, match=f"backend='{name}' is not available: {name} says so"):
            backends.resolve(name, device)


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(
        ValueError, match=r"backend must be one of 'auto', 'cuda', 'triton', 'cpu', 'reference', got 'gpu'"
    ):
        backends.resolve("gpu", "cpu")


@pytest.mark.parametrize(
    ("name", "device"),
    [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "mps"), ("triton", "cpu"), ("triton", "mps")],
)
def test_tensors_on_the_wrong_device_are_named(
    works: Any, monkeypatch: pytest.MonkeyPatch, name: str, device: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    works("cuda", "triton", "cpu")
    with pytest.raises(ValueError, match=f"backend='{name}' takes tensors on .*, got tensors on {device}"):
        backends.resolve(name, device)


def test_the_triton_interpreter_takes_cpu_tensors(works: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    works("triton")
    assert backends.resolve("triton", "cpu") == "triton"


def test_the_answer_is_a_constant_for_torch_compile() -> None:
    """Choosing loads libraries and warns, which Dynamo cannot trace; a first call inside a graph must still
    work.
    """

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if backends.resolve("auto", "cpu") in ("cpu", "reference") else x

    assert step(torch.zeros(2)).tolist() == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------- reasons


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with CUDA torch and kernels for sm_80 to sm_120, whose GPUs have the given compute
    capabilities.
    """

    def set_gpus(*capabilities: tuple[int, int], **info: Any) -> None:
        fake = types.ModuleType("ffr_ext._C")
        built = {
            "cuda": True,
            "torch_has_cuda": True,
            "cuda_archs": ["80", "90", "100", "120+PTX"],
            "nvcc": "13.0",
            "cpu_isa": "default",
            **info,
        }
        fake.build_info = lambda: built  # type: ignore[attr-defined]
        monkeypatch.setattr(backends, "native", lambda: fake)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
        monkeypatch.setattr(backends, "_importable", lambda name: True)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    return set_gpus


def test_an_old_gpu_gets_the_reference_and_a_message(machine: Any) -> None:
    machine((7, 0))
    with pytest.warns(
        backends.BackendFallbackWarning,
        match=r"cuda:0 has compute capability 7\.0, the kernels are for 80",
    ):
        assert backends.resolve("auto", "cuda") == "reference"
    assert re.search(r"compute capability 7\.0, Triton needs 8\.0", backends.available()["triton"].reason)


@pytest.mark.parametrize(
    ("capabilities", "info", "chosen"),
    [
        ([(8, 0)], {}, "cuda"),
        ([(8, 9)], {}, "cuda"),  # machine code runs on later minor versions
        ([(12, 1)], {}, "cuda"),
        ([(13, 0)], {}, "cuda"),  # from PTX
        ([(11, 0)], {}, "triton"),  # between two majors, older than the PTX
        ([(9, 0), (7, 5)], {}, "reference"),  # any visible GPU may be used
        ([(9, 0)], {"cuda": False}, "triton"),
        ([(9, 0)], {"torch_has_cuda": False}, "triton"),
        ([(9, 0)], {"cuda_archs": ["80"]}, "triton"),
    ],
)
@pytest.mark.filterwarnings("ignore::ffr_ext.backends.BackendFallbackWarning")
def test_the_kernels_that_run_on_a_gpu(machine: Any, capabilities: Any, info: Any, chosen: str) -> None:
    machine(*capabilities, **info)
    assert backends.resolve("auto", "cuda") == chosen


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["90a"], (9, 0), True),
        (["90a+PTX"], (10, 0), False),  # architecture-specific code, as PTX too, runs on that GPU alone
        (["100f"], (10, 3), True),
        (["100f"], (11, 0), False),
        (["86"], (8, 0), False),  # never on an earlier minor version
        (["75+PTX"], (12, 0), True),
        ([], (9, 0), False),
    ],
)
def test_covers(archs: list[str], capability: tuple[int, int], runs: bool) -> None:
    assert backends.covers(archs, capability) is runs


def test_without_a_gpu_the_reasons_name_what_is_missing(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    assert "torch.cuda.is_available() is False" in backends.available()["cuda"].reason
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without GPU support" in backends.available()["cuda"].reason


def test_missing_triton_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # what `import triton` meets where it is not installed
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.available()["triton"] == backends.Status(False, "triton is not installed")
    with pytest.raises(RuntimeError, match="triton is not installed"):
        backends.resolve("triton", "cpu")


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
import ffr_ext
assert "torch" not in sys.modules, "import ffr_ext must cost next to nothing"
import torch

def forbidden(*args, **kwargs):
    raise AssertionError("import ffr_ext, or work on the CPU, asked for a device")

for name in ("_lazy_init", "is_available", "device_count", "current_device", "get_device_capability",
             "get_device_properties", "get_device_name", "init"):
    setattr(torch.cuda, name, forbidden)
loaded = set(sys.modules)
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
    from ffr_ext import config

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
