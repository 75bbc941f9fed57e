"""Every Python snippet of README and docs runs, every make target and path they name exists."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
        *DOCS.glob("*.md"),
        *(DOCS / "performance").glob("*.md"),
    ]
)


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


WITH_PYTHON = [page for page in PAGES if _blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda p: p.name)
def test_snippets_run_one_after_another(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page share their names, as a reader who types them in would have it."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType(page.stem)
    # Dynamo of torch 2.12 and older imports the module of what it compiles.
    monkeypatch.setitem(sys.modules, page.stem, module)
    for number, block in enumerate(_blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text) + re.findall(
        r'src="(?!https?://)([^"]+)"', text
    )
    missing = [t for t in targets if not (page.parent / t).exists()]
    assert not missing


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_make_targets_exist(page: Path) -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)(?=[\s`,;]|$)", "\n".join(_blocks(page, "sh") + _inline(page))))
    for target in sorted(named):
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert dry.returncode == 0, dry.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_of_the_code_exist(page: Path) -> None:
    """Paths in backticks with a folder of the repository in front."""
    folders = "ffr_ext|csrc|tests|docs|benchmarks|examples|tools|requirements"
    named = [p for p in _inline(page) if re.fullmatch(rf"(?:{folders})/[\w./-]*", p)]
    assert not [p for p in named if not (ROOT / p).exists()]


def _inline(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


PUBLIC = (
    *(
        "ffr_ext",
        "ffr_ext.flow",
        "ffr_ext.pruning",
        "ffr_ext.pruning.graph",
        "ffr_ext.regularizers",
        "ffr_ext.structured",
        "ffr_ext.trainers",
    ),
)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_api_reference_names_every_public_name(name: str) -> None:
    """And each has a docstring for `make docs` to show."""
    pytest.importorskip("lightning") if name.endswith("trainers") else None
    module = importlib.import_module(name)
    reference = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = set(re.findall(r"^\.\. auto\w+:: [\w.]*?(\w+)$", reference, flags=re.MULTILINE))
    public = [public for public in module.__all__ if not public.startswith("_")]
    assert not [public for public in public if not (getattr(module, public).__doc__ or "").strip()]
    assert not set(public) - listed - {"LayerSpec"}  # a type alias
