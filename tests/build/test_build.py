"""Real builds: what is compiled where all tools are there, what is left out where one is missing, what must
fail.

Each build runs in a copy of the sources, without an index. The whole native build takes about half a minute,
so it is made once, from the source distribution, and looked at from several sides.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging_helpers import ROOT, Wheel, build_sdist, copy_tree, must, pip_wheel

sys.path.insert(0, str(ROOT / "tools"))
import build_plan
import cuda_check
import cuda_toolkit

linux = pytest.mark.skipif(sys.platform != "linux", reason="native code is built on Linux only")
needs_compiler = pytest.mark.skipif(build_plan.find_cxx() is None, reason="no C++ compiler on this machine")


def nvcc_or_skip() -> cuda_toolkit.Toolkit:
    if not build_plan.cuda_sources():
        pytest.skip("no .cu file in csrc/cuda")
    try:
        return cuda_toolkit.find_toolkit()
    except cuda_toolkit.ToolkitError as error:
        pytest.skip(str(error))


# --------------------------------------------------------------------------------------------------- the plan


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """``tools(torch_cuda="13.0", nvcc="13.0", without="cmake")``: a machine with everything else."""

    def set_tools(torch_cuda: str = "", nvcc: str | None = None, without: str = "") -> None:
        def find_toolkit() -> cuda_toolkit.Toolkit:
            if nvcc is None:
                raise cuda_toolkit.ToolkitError("no nvcc found")
            return cuda_toolkit.Toolkit(Path("nvcc"), nvcc, ("75", "80", "90", "100", "120"))

        def find_torch() -> build_plan.find_torch.Torch:
            if without == "torch":
                raise build_plan.find_torch.TorchNotFound("no torch found")
            return build_plan.find_torch.Torch("2.13.0", torch_cuda, tmp_path, tmp_path)

        monkeypatch.delenv("FFR_EXT_CUDA_ARCHS", raising=False)
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(cuda_toolkit, "find_toolkit", find_toolkit)
        monkeypatch.setattr(build_plan.find_torch, "find_torch", find_torch)
        monkeypatch.setattr(build_plan, "cuda_sources", lambda: [Path("flow.cu")])
        monkeypatch.setattr(build_plan, "find_program", lambda name: None if name == without else name)
        monkeypatch.setattr(build_plan, "find_cxx", lambda: None if without == "compiler" else "c++")
        monkeypatch.setattr(
            build_plan.importlib.util, "find_spec", lambda name: None if name == without else name
        )
        include = tmp_path if without == "Python.h" else tmp_path / "include"
        include.mkdir(exist_ok=True)
        if without != "Python.h":
            (include / "Python.h").touch()
        monkeypatch.setattr(build_plan.sysconfig, "get_path", lambda name: str(include))

    return set_tools


@pytest.mark.parametrize(
    ("mode", "torch_cuda", "nvcc", "native", "cuda", "note"),
    [
        ("auto", "", None, True, False, "torch is a build without CUDA"),
        ("auto", "", "13.0", True, False, "torch is a build without CUDA"),  # nvcc alone is no use
        ("auto", "13.0", "13.0", True, True, None),
        ("auto", "13.0", None, True, False, "no nvcc found"),
        ("auto", "12.8", "13.0", True, False, "torch is built for CUDA 12.8, nvcc is of 13.0"),
        ("cpu", "13.0", "13.0", True, False, "FFR_EXT_BUILD=cpu"),
        ("cuda", "13.0", "13.0", True, True, None),
        ("cuda", "", "13.0", True, True, None),  # how a machine without a GPU checks that it links
        ("cuda", "12.8", "13.0", True, True, None),
        ("off", "13.0", "13.0", False, False, "FFR_EXT_BUILD=off"),
    ],
)
@linux
def test_what_is_built(
    tools: Callable[..., None],
    mode: str,
    torch_cuda: str,
    nvcc: str | None,
    native: bool,
    cuda: bool,
    note: str | None,
) -> None:
    tools(torch_cuda=torch_cuda, nvcc=nvcc)
    plan = build_plan.make_plan(mode)
    assert (plan.native, plan.cuda) == (native, cuda)
    assert [note in text for text in plan.notes] == [True] if note else plan.notes == []


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        ("compiler", "no C++ compiler found"),
        ("cmake", "no cmake found"),
        ("ninja", "no ninja found"),
        ("pybind11", "pybind11 is not installed"),
        ("Python.h", "no Python.h in"),
        ("torch", "no torch found"),
    ],
)
@linux
def test_a_missing_tool_is_a_sentence_in_auto_and_an_error_where_it_is_required(
    tools: Callable[..., None], without: str, sentence: str
) -> None:
    tools(without=without, torch_cuda="13.0", nvcc="13.0")
    plan = build_plan.make_plan("auto")
    assert (plan.native, plan.cuda) == (False, False)
    assert [sentence in note for note in plan.notes] == [True]
    for mode in ("cpu", "cuda"):
        with pytest.raises(
            build_plan.BuildError, match=f"FFR_EXT_BUILD={mode} cannot be built: .*{re.escape(sentence)}"
        ):
            build_plan.make_plan(mode)
    assert not build_plan.make_plan("off").native


@linux
def test_cuda_without_nvcc_is_refused(tools: Callable[..., None]) -> None:
    tools(torch_cuda="13.0")
    with pytest.raises(build_plan.BuildError, match=r"FFR_EXT_BUILD=cuda cannot be built: .*no nvcc found"):
        build_plan.make_plan("cuda")


def test_an_unknown_mode_lists_the_valid_ones() -> None:
    with pytest.raises(build_plan.BuildError, match=r"must be one of auto, cpu, cuda, off, got 'yes'"):
        build_plan.make_plan("yes")


@pytest.mark.parametrize(
    ("requested", "archs"),
    [
        ("", ["80", "90", "100", "120+PTX"]),  # 75 is known to nvcc and not asked for
        ("90", ["90+PTX"]),
        ("120;80", ["80", "120+PTX"]),
        ("9.0, 12.0", ["90", "120+PTX"]),  # as TORCH_CUDA_ARCH_LIST writes them
        ("90a", ["90a"]),  # such code is for one GPU: no PTX to go on with
        ("80 90a", ["80+PTX", "90a"]),
    ],
)
def test_architectures(requested: str, archs: list[str]) -> None:
    toolkit = cuda_toolkit.Toolkit(Path("nvcc"), "13.0", ("75", "80", "90", "100", "120"))
    assert cuda_toolkit.choose_archs(toolkit, requested) == archs


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ("70", "nvcc 13.0 does not compile for 70"),
        ("hopper", "expected architectures such as 90 .* got 'hopper'"),
    ],
)
def test_architectures_that_are_refused(requested: str, message: str) -> None:
    toolkit = cuda_toolkit.Toolkit(Path("nvcc"), "13.0", ("75", "80", "90", "100", "120"))
    with pytest.raises(cuda_toolkit.ToolkitError, match=message):
        cuda_toolkit.choose_archs(toolkit, requested)


def test_an_older_toolkit_drops_what_it_does_not_know() -> None:
    toolkit = cuda_toolkit.Toolkit(Path("nvcc"), "12.4", ("50", "80", "86", "89", "90"))
    assert cuda_toolkit.choose_archs(toolkit) == ["80", "90+PTX"]
    assert cuda_toolkit.cmake_archs(["80", "90+PTX"]) == "80-real;90"


PTXAS = """ptxas info    : Compiling entry function '_Z1fPf' for 'sm_90'
ptxas info    : Function properties for _Z1fPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compiling entry function '_Z1gPf' for 'sm_90'
ptxas info    : Function properties for _Z1gPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_the_resource_report_reads_ptxas() -> None:
    assert cuda_check.parse_ptxas(PTXAS, "90") == [
        cuda_check.Usage("_Z1fPf", "90", 255, 1024, 16, 12),
        cuda_check.Usage("_Z1gPf", "90", 12, 0, 0, 0),
    ]


# --------------------------------------------------------------------------------------------------- failures


@linux
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        # a PATH with nothing on it; cmake and ninja still come from beside this Python
        ({"PATH": "/nothing", "CXX": ""}, "no C++ compiler found"),
        # an environment into which torch comes later: metadata and wheel must come out all the same
        ({"FFR_EXT_TORCH_DIR": "/nothing"}, "no torch found (looked for /nothing)"),
    ],
    ids=["compiler", "torch"],
)
def test_a_missing_tool_gives_a_pure_wheel_that_says_so(
    tmp_path: Path, environ: dict[str, str], sentence: str
) -> None:
    done = must(pip_wheel(copy_tree(tmp_path / "source"), tmp_path, **environ))
    wheel = Wheel(tmp_path)
    assert wheel.libraries == []
    assert wheel.tags == ["py3-none-any"]
    assert any(sentence in note for note in wheel.record["notes"])
    assert sentence in done.stdout + done.stderr
    must(subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel.path), str(tmp_path / "site")]))
    site = tmp_path / "site"
    info = subprocess.run(
        [sys.executable, "-m", "ffr_ext", "info"],
        cwd=site, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True,
    )  # fmt: skip
    assert re.search(rf"cpu +no .*{re.escape(sentence)}", must(info).stdout)


@linux
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "cpu"])
@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("csrc/torch/ops.cpp", '#error "broken on purpose"', "broken on purpose"),
        ("CMakeLists.txt", 'message(FATAL_ERROR "broken on purpose")', "broken on purpose"),
    ],
    ids=["compiler", "cmake"],
)
def test_an_error_of_a_tool_that_is_there_stops_the_install(
    tmp_path: Path, mode: str, file: str, line: str, said: str
) -> None:
    """Never a pure-Python install instead: it would look like success."""
    source = copy_tree(tmp_path / "source")
    text = (source / file).read_text()
    (source / file).write_text(text + line + "\n" if file.endswith(".txt") else line + "\n" + text)
    for other in [*(source / "csrc" / "cpu").rglob("*.cpp"), source / "csrc" / "module.cpp"]:
        other.write_text("")  # not what this is about, and slow to compile
    done = pip_wheel(source, tmp_path, FFR_EXT_BUILD=mode)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr
    assert "building the native code failed" in done.stdout + done.stderr
    assert list(tmp_path.glob("*.whl")) == []


@linux
@needs_compiler
@pytest.mark.slow
def test_a_cache_of_another_directory_is_thrown_away(tmp_path: Path) -> None:
    """CMake refuses to go on in a tree that was moved; the build starts afresh and gets as far as the
    compiler.
    """
    source = copy_tree(tmp_path / "source")
    (source / "csrc" / "module.cpp").write_text('#error "reached the compiler"')
    cache = source / "build" / f"cmake-{sys.implementation.cache_tag}" / "CMakeCache.txt"
    cache.parent.mkdir(parents=True)
    cache.write_text("CMAKE_HOME_DIRECTORY:INTERNAL=/somewhere/else\n")
    done = pip_wheel(source, tmp_path, FFR_EXT_BUILD="cpu", MAX_JOBS="1")
    assert "does not match the source" in done.stdout + done.stderr
    assert "reached the compiler" in done.stdout + done.stderr


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        (
            {"FFR_EXT_BUILD": "cuda", "CUDACXX": "/no/nvcc"},
            "FFR_EXT_BUILD=cuda cannot be built: .*CUDACXX=/no/nvcc",
        ),
        (
            {"FFR_EXT_BUILD": "cpu", "CXX": "/no/c++"},
            "FFR_EXT_BUILD=cpu cannot be built: CXX=/no/c\\+\\+ is not found",
        ),
        ({"FFR_EXT_BUILD": "cpu", "FFR_EXT_TORCH_DIR": "/no/torch"}, "no torch found .*/no/torch"),
        ({"FFR_EXT_BUILD": "gpu"}, "FFR_EXT_BUILD must be one of auto, cpu, cuda, off, got 'gpu'"),
    ],
)
def test_what_is_required_and_impossible_fails_with_a_sentence(
    tmp_path: Path, environ: dict[str, str], sentence: str
) -> None:
    source = copy_tree(tmp_path / "source")
    (source / "csrc" / "cuda").mkdir(exist_ok=True)
    (source / "csrc" / "cuda" / "empty.cu").touch()  # whatever kernels there are, nvcc is asked for
    done = pip_wheel(source, tmp_path, **environ)
    assert done.returncode != 0
    assert re.search(sentence, done.stdout + done.stderr)


# -------------------------------------------------------------------------------------------------- successes


@pytest.fixture(scope="module")
def native_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked source distribution, in which the builds below share what they have compiled."""
    folder = tmp_path_factory.mktemp("native")
    archive = build_sdist(copy_tree(folder / "tree"), folder / "sdist")
    shutil.unpack_archive(archive, folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return source


def install(wheel: Wheel, site: Path) -> None:
    must(subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel.path), str(site)]))


USE = """
import json, torch, ffr_ext
from ffr_ext import backends, ffr_loss
x = [torch.randn(2, 3, 8, 8, requires_grad=True) for _ in range(4)]
loss, plain = ffr_loss(x, backend="cpu"), ffr_loss(x, backend="reference")
torch.testing.assert_close(loss, plain)
loss.backward()
print(json.dumps({"file": backends.native().__file__, **backends.native().build_info()}))
"""


def use(site: Path) -> dict[str, object]:
    """What build_info() says in a process that runs the package installed in ``site``."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USE],
        cwd=site, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    info: dict[str, object] = json.loads(must(done).stdout.splitlines()[-1])
    assert Path(str(info["file"])).parent == site / "ffr_ext"
    return info


@pytest.fixture(scope="module")
def native_wheel(native_source: Path) -> Wheel:
    out = native_source.parent.parent
    must(pip_wheel(native_source, out, FFR_EXT_BUILD="cpu"))
    return Wheel(out)


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    folder = (
        Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else Path()
    )
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))


@linux
@needs_compiler
@pytest.mark.slow
class TestNativeWheel:
    def test_it_works_where_it_is_unpacked(self, native_wheel: Wheel, tmp_path: Path) -> None:
        install(native_wheel, tmp_path)
        info = use(tmp_path)
        assert info["native"] is True
        assert info["cuda"] is False

    def test_it_is_for_this_python_and_platform(self, native_wheel: Wheel) -> None:
        assert len(native_wheel.libraries) == 1
        (tag,) = native_wheel.tags
        assert tag.startswith(f"cp{sys.version_info.major}{sys.version_info.minor}-")
        assert not tag.endswith("-any")

    def test_it_exports_one_symbol_and_remembers_no_directory_of_the_builder(
        self, native_wheel: Wheel, tmp_path: Path
    ) -> None:
        if shutil.which("nm") is None or shutil.which("readelf") is None:
            pytest.skip("needs binutils")
        install(native_wheel, tmp_path)
        library = tmp_path / native_wheel.libraries[0]
        symbols = must(
            subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True)
        ).stdout
        assert [line.split()[-1] for line in symbols.splitlines()] == ["PyInit__C"]
        dynamic = must(subprocess.run(["readelf", "-d", library], capture_output=True, text=True)).stdout
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic
        # libtorch.so: how a CUDA build of torch brings libtorch_cuda in. No OpenMP beside torch's own.
        needed = re.findall(r"NEEDED.*\[(.*?)\]", dynamic)
        assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= set(needed)
        assert not [name for name in needed if "omp" in name or "cuda" in name]
        assert str(native_wheel.path.parent).encode() not in library.read_bytes()

    def test_with_cuda_it_still_loads_next_to_this_torch(
        self, native_wheel: Wheel, native_source: Path, tmp_path: Path
    ) -> None:
        """Compiles and links csrc/cuda. A libtorch_cuda symbol that is not weak fails here, at the import."""
        nvcc_or_skip()
        must(pip_wheel(native_source, tmp_path, FFR_EXT_BUILD="cuda", FFR_EXT_CUDA_ARCHS="90"))
        wheel = Wheel(tmp_path)
        assert wheel.record["cuda"] is True
        install(wheel, tmp_path / "site")
        info = use(tmp_path / "site")
        assert info["cuda"] is True
        assert info["cuda_archs"] == ["90+PTX"]
        cuobjdump = find_cuobjdump()
        if cuobjdump is not None:
            library = str(tmp_path / "site" / wheel.libraries[0])
            for option, code in (("--list-elf", r"\.sm_90\.cubin"), ("--list-ptx", r"\.sm_90\.ptx")):
                found = must(
                    subprocess.run([cuobjdump, option, library], capture_output=True, text=True)
                ).stdout
                assert len(re.findall(code, found)) == len(
                    list((native_source / "csrc" / "cuda").glob("*.cu"))
                )
