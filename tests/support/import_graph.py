"""Reads which part of the package imports which, and draws it: ``python tests/support/import_graph.py --write``.

A *room* is a folder of the package with the folders in it; the modules beside them are two more, ``entry`` (the
command line and the package's own ``__init__``) and ``base`` (records, options and errors, which import no room).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "rasd_integrations"
PAGE = ROOT / "docs" / "reference" / "imports.md"
ENTRY = {"__init__", "__main__", "cli"}
HEAD = """# Imports between rooms

Written by `python tests/support/import_graph.py --write`; a test compares this page with the code.
A room is a folder of `rasd_integrations/` with the folders in it. `entry` is `__init__`, `__main__` and `cli`; `base` is every other module of
the root. Imports point down: [architecture](../explanation/architecture.md) says what each room does.

The picture is of the rooms, without `base` and without arrows that follow from two others. The table says for each folder
which others it imports: {count} arrows between rooms, and {inside} inside of one.

"""

Arrows = set[tuple[str, str]]


@cache
def module_imports() -> frozenset[tuple[str, str]]:
    """Return (importer, imported) of all modules of the package; a folder's own module is ``FOLDER.__init__``."""
    files = {
        path.with_suffix("").relative_to(ROOT): path for path in (ROOT / PACKAGE).rglob("*.py")
    }
    names = {".".join(path.parts) for path in files}
    found: Arrows = set()
    for path, file in files.items():
        for node in _run(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
                targets = [name if _module(name, names) else node.module for name in targets]
            else:
                continue
            found |= {(".".join(path.parts), m) for t in targets if (m := _module(t, names))}
    return frozenset((a, b) for a, b in found if a != b)


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """Yield a file's nodes without those that only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)):
            yield from _run(child)


def _module(name: str, names: set[str]) -> str | None:
    return next((n for n in (name, f"{name}.__init__") if n in names), None)


def folder(module: str) -> str:
    """Return the folder of a module, or which of the two rooms outside of all folders it is in."""
    *folders, name = module.split(".")[1:]
    return "/".join(folders) or ("entry" if name in ENTRY else "base")


def folder_imports() -> Arrows:
    """Return (importing folder, imported folder)."""
    return {(folder(a), folder(b)) for a, b in module_imports() if folder(a) != folder(b)}


def between_rooms(arrows: Arrows) -> Arrows:
    """Return the arrows that leave a room."""
    return {(a, b) for a, b in arrows if a.partition("/")[0] != b.partition("/")[0]}


def circles() -> list[str]:
    """Return circles among the files and folders of any one folder (types alone may refer to one another)."""
    inside: dict[str, dict[str, set[str]]] = {}
    for importer, imported in module_imports():
        a, b = importer.split("."), imported.split(".")
        depth = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        inside.setdefault("/".join(a[:depth]), {}).setdefault(a[depth], set()).add(b[depth])
    found = []
    for folder, graph in sorted(inside.items()):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as e:
            found.append(f"{folder}: {' <- '.join(e.args[1])}")
    return found


def page() -> str:
    """Return the page of the docs: a picture and a table."""
    arrows = sorted(folder_imports())
    count = len(between_rooms(set(arrows)))
    lines = [HEAD.format(count=count, inside=len(arrows) - count), "```mermaid\nflowchart TD\n"]
    lines += [f"    {a} --> {b}\n" for a, b in _drawn(arrows)]
    lines.append("```\n\n| folder | imports |\n|---|---|\n")
    for name, group in groupby(arrows, key=lambda arrow: arrow[0]):
        lines.append(f"| {name} | {', '.join(b for _, b in group)} |\n")
    return "".join(lines)


def _drawn(arrows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the arrows between rooms but ``base`` that do not follow from two others."""
    below: dict[str, set[str]] = {}
    for importer, imported in arrows:
        a, b = importer.partition("/")[0], imported.partition("/")[0]
        if a != b != "base":
            below.setdefault(a, set()).add(b)

    def reaches(start: str, end: str) -> bool:
        return end in below.get(start, ()) or any(reaches(n, end) for n in below.get(start, ()))

    pairs = ((a, b) for a, found in below.items() for b in found)
    return sorted((a, b) for a, b in pairs if not any(reaches(n, b) for n in below[a] - {b}))


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
