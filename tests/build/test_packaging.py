"""What the package asks for and what it ships: one requirement, no torch at build time, one version."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging_helpers import ROOT, Wheel, build_sdist, copy_tree, must, pip_wheel

import ffr_ext

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("csrc", "ffr_ext", "requirements", "tests", "tools")
BUILD_FILES = [ROOT / "setup.py", *sorted((ROOT / "tools").glob("*.py"))]


def test_a_build_does_not_fetch_torch() -> None:
    """Named there, pip would download a second torch into the build environment, CUDA libraries and all."""
    required = {Requirement(text).name for text in PYPROJECT["build-system"]["requires"]}
    assert required == {"setuptools", "pybind11", "cmake", "ninja"}


@pytest.mark.parametrize("file", BUILD_FILES, ids=lambda file: file.name)
def test_no_build_file_imports_torch_or_the_package(file: Path) -> None:
    """Under build isolation neither is importable, and importing torch costs seconds in every pip command."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        assert not {name.split(".")[0] for name in names} & {"torch", "ffr_ext", "numpy"}


def test_torch_is_the_only_runtime_requirement_and_has_no_upper_bound() -> None:
    assert PYPROJECT["project"]["dependencies"] == ["torch>=2.10"]


@pytest.mark.parametrize("extra", ["lightning", "hf", "demo", "test", "dev"])
def test_extras_do_not_pin_torch(extra: str) -> None:
    names = {Requirement(text).name for text in PYPROJECT["project"]["optional-dependencies"][extra]}
    assert names
    assert not names & {"torch", "torchvision"}


OPTIONAL = (
    *("accelerate", "expecttest", "hypothesis", "lightning", "matplotlib", "onnx", "onnxruntime"),
    *("onnxscript", "psutil", "pybind11", "rich", "sklearn", "torch_pruning", "transformers"),
)


@pytest.mark.slow
def test_no_test_needs_an_optional_package_to_be_collected(tmp_path: Path) -> None:
    """On a GPU machine without network they may be missing, and one file that fails to import stops the run."""
    lines = ["import sys", f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))"]  # None: cannot be imported
    (tmp_path / "without_optional_packages.py").write_text("\n".join(lines))
    command = [sys.executable, "-m", "pytest", "-p", "without_optional_packages", "-p", "no:cacheprovider"]
    # Without autoload: hypothesis brings a plugin along.
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [*command, "--collect-only", "-q", "-m", "gpu", "tests"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "tests/native/test_gpu.py::test_cuda_graph_replays_with_new_values" in done.stdout


def pins() -> dict[str, str]:
    return {
        requirement.name.lower(): spec.version
        for line in (ROOT / "requirements" / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
        for requirement in [Requirement(line)]
        for spec in requirement.specifier
        if spec.operator == "=="
    }


@pytest.mark.parametrize("name", ["build", "demo", "test", "vision", "dev", "docs"])
def test_every_requirement_of_make_is_pinned(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    wanted = {line.lower() for line in lines if line and not line.startswith(("#", "-"))}
    assert wanted
    assert wanted <= pins().keys()


def test_the_pinned_torchvision_is_made_for_the_pinned_torch() -> None:
    """0.15 came with 2.0, and both count on together. Otherwise its models are skipped without a word."""
    torch_version, vision_version = (pins()[name].split(".") for name in ("torch", "torchvision"))
    assert vision_version[0] == "0"
    assert torch_version[0] == "2"
    assert int(vision_version[1]) == int(torch_version[1]) + 15


def test_the_version_is_written_once() -> None:
    """Everything else reads ffr_ext/__init__.py."""
    assert "version" in PYPROJECT["project"]["dynamic"]
    quoted = re.compile(rf"""["']{re.escape(ffr_ext.__version__)}["']""")
    files = [*BUILD_FILES, ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", *(ROOT / "csrc").rglob("*.cpp")]
    files += [file for file in (ROOT / "ffr_ext").rglob("*.py") if file != ROOT / "ffr_ext" / "__init__.py"]
    assert [str(file) for file in files if quoted.search(file.read_text())] == []


def test_only_the_registrations_include_torch() -> None:
    """Kernels stay free of it: fast to compile, and nvcc never parses it. The module must not meet the
    pybind11 among torch's headers, which is an error under TORCH_TARGET_VERSION in torch 2.10.
    """
    suffixes = {".h", ".inc", ".cpp", ".cu", ".cuh"}
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in suffixes]
    users = [file for file in sources if re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text())]
    assert {file.parent.name for file in users} == {"torch"}


def test_nothing_that_torch_2_10_lacks_is_used() -> None:
    """Found by running the suite with older ones, which is not done every day: tags of torch 2.13, and lists of
    dtypes in a schema, which torch 2.11 hands over as numbers."""
    lacking = re.compile(r"Tag\.(inplace|out)\b|ScalarType\[\] \w")
    users = [
        path for path in (ROOT / "ffr_ext").rglob("*.py") if lacking.search(path.read_text(encoding="utf-8"))
    ]
    assert users == []


def test_find_torch_reads_what_torch_says_of_itself_without_importing_it() -> None:
    import torch

    code = (
        "import runpy, sys; runpy.run_path('tools/find_torch.py', run_name='__main__'); "
        "assert 'torch' not in sys.modules"
    )
    done = must(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True))
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert found["version"] == torch.__version__
    assert found["cuda"] == (torch.version.cuda or "")
    assert Path(found["lib"]).samefile(Path(torch.__file__).parent / "lib")


@pytest.mark.parametrize(
    ("version_py", "message"),
    [
        (
            "__version__ = '2.9.1+cu130'\ncuda: Optional[str] = '13.0'\n",
            r"torch 2\.9\.1\+cu130 in .* is too old",
        ),
        ("", "cannot read the version"),
        (None, "no torch found .* install torch first"),
    ],
)
def test_find_torch_says_what_is_wrong(tmp_path: Path, version_py: str | None, message: str) -> None:
    if version_py is not None:
        (tmp_path / "include" / "torch" / "csrc").mkdir(parents=True)
        (tmp_path / "version.py").write_text(version_py)
    done = subprocess.run(
        [sys.executable, "tools/find_torch.py"],
        cwd=ROOT, env={**os.environ, "FFR_EXT_TORCH_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(message, done.stderr)


OLD_SETUPTOOLS = """
import runpy, sys, setuptools
setuptools.__version__ = "65.5.0"  # what a new environment of Python 3.11 holds: without a command that makes wheels
hidden = ["setuptools.command.bdist_wheel", *sys.argv[1:2]]
sys.modules.update(dict.fromkeys(hidden))  # None: cannot be imported
sys.argv = ["setup.py", "dist_info", "--help"]
runpy.run_path(SETUP, run_name="__main__")
"""


@pytest.mark.parametrize("missing", [["wheel"], []], ids=["without wheel", "with wheel"])
def test_a_setuptools_that_cannot_make_wheels_is_told_what_helps(tmp_path: Path, missing: list[str]) -> None:
    """`pip install --no-build-isolation` checks no version, and would end in `invalid command 'bdist_wheel'`."""
    done = subprocess.run(
        [sys.executable, "-c", f"SETUP = {str(ROOT / 'setup.py')!r}{OLD_SETUPTOOLS}", *missing],
        cwd=tmp_path, env={**os.environ, "FFR_EXT_BUILD": "off"}, capture_output=True, text=True,
    )  # fmt: skip
    message = "setuptools 65.5.0 needs the package wheel to make one; .*pip install -U setuptools"
    assert bool(re.search(message, done.stderr)) == bool(missing), done.stderr
    assert (done.returncode == 0) != bool(missing), done.stderr


# -------------------------------------------------------------------------------------------- what is shipped


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    out = tmp_path_factory.mktemp("pure")
    must(pip_wheel(copy_tree(out / "source"), out, FFR_EXT_BUILD="off"))
    return Wheel(out)


def test_off_makes_a_wheel_for_every_platform(pure_wheel: Wheel) -> None:
    assert pure_wheel.tags == ["py3-none-any"]
    assert pure_wheel.libraries == []
    assert pure_wheel.record == {
        "build": "off",
        "native": False,
        "cuda": False,
        "notes": ["FFR_EXT_BUILD=off asked for no native code"],
    }


def test_the_wheel_holds_the_package_and_nothing_else(pure_wheel: Wheel) -> None:
    assert {name.split("/")[0] for name in pure_wheel.names if ".dist-info/" not in name} == {"ffr_ext"}
    shipped = {name for name in pure_wheel.names if name.endswith(".py")}
    source = pure_wheel.path.parent / "source"
    assert shipped == {str(file.relative_to(source)) for file in (source / "ffr_ext").rglob("*.py")}
    assert "ffr_ext/py.typed" in pure_wheel.names
    assert any(name.endswith("LICENSE") for name in pure_wheel.names)


def test_metadata(pure_wheel: Wheel) -> None:
    metadata = pure_wheel.metadata
    assert metadata["Name"] == "ffr-ext"
    assert metadata["Version"] == ffr_ext.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert [str(r) for r in required if r.marker is None or r.marker.evaluate({"extra": ""})] == [
        "torch>=2.10"
    ]


def test_a_module_removed_from_the_source_is_not_packed_again(tmp_path: Path) -> None:
    """setuptools leaves old files in build/lib and would ship them."""
    source = copy_tree(tmp_path / "source")
    (source / "ffr_ext" / "removed.py").touch()
    must(pip_wheel(source, tmp_path / "first", FFR_EXT_BUILD="off"))
    (source / "ffr_ext" / "removed.py").unlink()
    must(pip_wheel(source, tmp_path / "second", FFR_EXT_BUILD="off"))
    assert "ffr_ext/removed.py" in Wheel(tmp_path / "first").names
    assert "ffr_ext/removed.py" not in Wheel(tmp_path / "second").names


def test_the_sdist_holds_every_source(tmp_path: Path) -> None:
    """test_build.py builds from it; here: nothing that a build or a test needs is left out."""
    source = copy_tree(tmp_path / "source")
    (source / "ffr_ext" / "_C.cpython-311-x86_64-linux-gnu.so").touch()  # what an editable install leaves
    (source / "ffr_ext" / "_build_record.json").write_text(json.dumps({}))
    with tarfile.open(build_sdist(source, tmp_path / "out")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = [file for folder in FOLDERS for file in (source / folder).rglob("*") if file.is_file()]
    left = (".so", ".pyc", "_build_record.json")  # what builds and imports leave
    assert {str(file.relative_to(source)) for file in sources if not file.name.endswith(left)} <= names
    assert {"CMakeLists.txt", "LICENSE", "MANIFEST.in", "Makefile", "pyproject.toml", "setup.py"} <= names
    assert not [name for name in names if name.endswith(left)]
