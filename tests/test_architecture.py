"""Who may know whom, and rules of the house that no linter holds."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import import_graph
import pytest

import rasd_integrations

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "rasd_integrations").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
MAX_LINES = 400
MAX_FILES = 12
MAX_ARROWS = 120  # 90 in one process; the rooms beyond it know most others


UNWANTED = {
    "rasd_integrations": {"langchain_core", "llama_index", "chromadb", "faiss", "rich"},
    "rasd_integrations.retrieval": {"langchain_core", "llama_index", "chromadb", "faiss"},
    "rasd_integrations.langchain": {"llama_index", "chromadb", "faiss"},
    "rasd_integrations.llama_index": {"langchain_core", "chromadb", "faiss"},
    "rasd_integrations.cli": {"langchain_core", "llama_index", "chromadb", "faiss", "rich"},
}
# An interpreter that has torch forks for each module, which finds the rest as fresh as another would.
IMPORTS = """
import importlib, os, sys, torch, transformers
for name in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(name)
        print(name, *{m.partition('.')[0] for m in sys.modules}, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, name
"""


@pytest.mark.slow
def test_a_room_brings_no_framework_or_store_that_it_does_not_serve() -> None:
    """Importing a room leaves the other frameworks and every store alone."""
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, *UNWANTED]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    imported = {name: {*names} for name, *names in map(str.split, out.splitlines())}
    assert {*UNWANTED} == {*imported}
    assert {} == {name: bad for name in UNWANTED if (bad := imported[name] & UNWANTED[name])}


def test_the_version_is_the_installed_one() -> None:
    """The single source of the version is what pip sees."""
    from rasd_integrations._version import __version__

    assert __version__ == rasd_integrations.__version__
    try:
        installed = importlib.metadata.version("rasd-integrations")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is run from its folder, not installed")
    assert __version__ == installed


def test_all_names_what_is_public() -> None:
    """Every name in ``__all__`` exists and says in a docstring what it is."""
    documented = [n for n in rasd_integrations.__all__ if getattr(rasd_integrations, n).__doc__]
    assert [n for n in rasd_integrations.__all__ if n != "__version__"] == [
        n for n in documented if n != "__version__"
    ]


def test_no_file_grows_past_its_idea() -> None:
    """A file over the limit holds a second idea."""
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE}
    too_long = [
        f"{path.relative_to(ROOT)}: {length}"
        for path, length in lengths.items()
        if length > MAX_LINES
    ]
    assert [] == too_long


def test_no_folder_holds_more_than_a_reader_can_survey() -> None:
    """A folder of the package has few files."""
    counts = Counter(path.parent for path in PACKAGE)
    crowded = [f"{f.relative_to(ROOT)}: {n}" for f, n in counts.items() if n > MAX_FILES]
    assert [] == crowded


def test_imports_between_rooms_point_down_and_are_few() -> None:
    """There is no circle among files or folders, no arrow up, and fewer than 120 arrows between rooms."""
    assert [] == import_graph.circles()
    arrows = import_graph.between_rooms(import_graph.folder_imports())
    assert len(arrows) < MAX_ARROWS, sorted(arrows)
    tomllib = pytest.importorskip("tomllib")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    layers = tools["importlinter"]["contracts"][0]["layers"]
    level = {name: i for i, names in enumerate(layers) for name in names.split(" | ")}
    pairs = {(a.split(".")[1], b.split(".")[1]) for a, b in import_graph.module_imports()}
    up = [(a, b) for a, b in pairs if a in level and a != b and level[a] >= level[b]]
    assert [] == up


def test_the_drawn_imports_are_those_of_the_code() -> None:
    """``python tests/support/import_graph.py --write`` draws them again."""
    assert import_graph.page() == import_graph.PAGE.read_text(encoding="utf-8")


def test_every_test_says_what_it_shows() -> None:
    """Each test function has a docstring."""
    silent = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert [] == silent


def test_pages_link_to_files_that_exist() -> None:
    """Every relative link of the README and the docs leads somewhere."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / link).exists()
    ]
    assert [] == broken


def test_every_extra_is_part_of_all() -> None:
    """``pip install 'rasd-integrations[all]'`` leaves no extra out but Ray, which has an environment of its own."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(extras) - {"all", "ray"} == set(re.findall(r"[\w-]+", everything.partition("[")[2]))


def test_every_dependency_is_bounded_on_both_sides() -> None:
    """A new major version of a dependency is taken on purpose."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        lines += [line for line in extra if not line.startswith("rasd-integrations")]
    assert [] == [line for line in lines if not (">=" in line and ",<" in line)]
