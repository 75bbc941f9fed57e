"""Which backend a call gets, and what stands in the way of the others."""

from __future__ import annotations

import re
import sys
import types
import warnings
from typing import Any

import pytest
import torch

from ffr_ext import backends

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
        monkeypatch.setattr(backends, "_REFUSES", {})

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
@pytest.mark.filterwarnings("ignore::ffr_ext.backends.BackendFallbackWarning")
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


@pytest.mark.parametrize("name", ["gpu", None, ["cpu"]])
def test_an_unknown_name_lists_the_valid_ones(name: Any) -> None:
    valid = "'auto', 'cuda', 'triton', 'cpu', 'reference'"
    with pytest.raises(ValueError, match=re.escape(f"backend must be one of {valid}, got {name!r}")):
        backends.resolve(name, "cpu")


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
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
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
        ([(9, 0), (7, 5)], {}, "cuda"),  # the second is too old, and is another
        ([(9, 0)], {"cuda": False}, "triton"),
        ([(9, 0)], {"torch_has_cuda": False}, "triton"),
        ([(9, 0)], {"cuda_archs": ["80"]}, "triton"),
    ],
)
@pytest.mark.filterwarnings("ignore::ffr_ext.backends.BackendFallbackWarning")
def test_the_kernels_that_run_on_a_gpu(machine: Any, capabilities: Any, info: Any, chosen: str) -> None:
    machine(*capabilities, **info)
    assert backends.resolve("auto", "cuda:0") == backends.resolve("auto", "cuda") == chosen


def test_one_old_gpu_does_not_take_the_kernels_from_the_others(machine: Any) -> None:
    machine((9, 0), (7, 0), (12, 0))
    assert backends.resolve("auto", torch.device("cuda", 0)) == "cuda"
    assert backends.resolve("auto", torch.device("cuda", 2)) == "cuda"
    with pytest.warns(backends.BackendFallbackWarning, match=r"tensors on cuda:1.*compute capability 7\.0"):
        assert backends.resolve("auto", torch.device("cuda", 1)) == "reference"
    for name, least in (("cuda", "the kernels are for 80"), ("triton", r"Triton needs 8\.0")):
        assert backends.resolve(name, torch.device("cuda", 0)) == name
        with pytest.raises(RuntimeError, match=rf"cuda:1 has compute capability 7\.0, {least}"):
            backends.resolve(name, torch.device("cuda", 1))
        status = backends.available()[name]
        assert status.available
        assert "; but cuda:1 has compute capability 7.0" in status.reason


@pytest.mark.parametrize("device", ["xpu", "mps", "hpu"])
def test_auto_on_another_accelerator_says_once_that_plain_torch_serves(device: str) -> None:
    with pytest.warns(backends.BackendFallbackWarning, match=f"no ffr_ext kernel serves tensors on {device}"):
        assert backends.resolve("auto", device) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", device) == "reference"
        assert backends.resolve("auto", "meta") == "reference"


def test_rocm_is_told_what_serves_and_what_does_not(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.resolve("auto", "cuda:0") == "triton"
    assert "built for ROCm" in backends.available()["cuda"].reason
    assert "have not been run on an AMD GPU" in backends.available()["triton"].reason


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
