"""Apply the faults of the table one at a time and name those that no test catches: ``make mutants``.

Works on copies of the checkout, which is left alone. Prints a markdown table and exits with 1 if a fault was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mutants import PACKAGE, ROOT, ROWS, Mutant

COPIED = (PACKAGE, "tests", "examples", "docs", "pyproject.toml", "README.md", "Makefile")
# What tests import, loaded once and forked: half of a row's time otherwise.
PRELOADED = (
    "torch", "transformers.models.llama.modeling_llama", "transformers.integrations.sdpa_attention",
    "hypothesis", "langchain_core.language_models.chat_models", "langchain.agents", "llama_index.core", "chromadb",
)  # fmt: skip
OPTIONS = (
    "-x", "-q", "--no-header", "-p", "no:cacheprovider", "-o", "console_output_style=classic",
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # of plugins that are preloaded
)  # fmt: skip
FEW = 4  # rows for which preloading does not pay


class Tree:
    """A copy of what tests read from the checkout ``root``, to run them in."""

    def __init__(self, root: Path, folder: Path) -> None:
        """Copy it into ``folder``."""
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.data = root.parent / "shared" / "data"
        unread = shutil.ignore_patterns("*.pyc", "__pycache__", ".rasd")
        for name in COPIED:
            source = root / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=unread)
            elif source.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, folder / name)

    def run(self, tests: Sequence[str], timeout: float) -> tuple[int | None, str]:
        """Return pytest's exit status, ``None`` if it had to be killed, and what it printed."""
        child = os.fork()
        if not child:
            self._run_pytest(tests)
        status, deadline = 0, time.monotonic() + timeout
        ended = 0
        while not ended and time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):  # also what the tests have left running
            os.killpg(child, signal.SIGKILL)
        if not ended:
            os.waitpid(child, 0)
        printed = self.log.read_text(encoding="utf-8", errors="replace")
        return os.waitstatus_to_exitcode(status) if ended else None, printed

    def _run_pytest(self, tests: Sequence[str]) -> None:
        """Become a run of pytest; does not return."""
        status = 3  # an internal error, to pytest
        try:
            os.setsid()
            os.chdir(self.folder)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            # No bytecode: a mutant of the same size, written within the same second, would run its predecessor's.
            sys.dont_write_bytecode = True
            sys.path.insert(0, str(self.folder))
            os.environ["PYTHONPATH"], os.environ["PYTHONDONTWRITEBYTECODE"] = str(self.folder), "1"
            os.environ.setdefault("RASD_DATA", str(self.data))
            import pytest

            status = pytest.main([*OPTIONS, *(f"tests/{test}" for test in tests)])
            sys.stdout.flush()
        except BaseException:  # noqa: BLE001  (said in the log that the parent reads)
            traceback.print_exc()
        finally:
            os._exit(status)

    def judged(self, mutant: Mutant, timeout: float) -> str:
        """Return how the tests of one mutant fare."""
        path = self.folder / PACKAGE / mutant.file
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        if before.count(mutant.old) != 1:
            return "NOT RUN: the old text is not there once"
        path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
        try:
            return result_of(*self.run(mutant.tests, timeout))
        finally:
            path.write_text(before, encoding="utf-8")


def result_of(status: int | None, printed: str) -> str:
    """Return how a mutant fared: caught, and by which test; or missed."""
    if status is None:
        return "caught: the tests hang"
    if status == 0:
        return "MISSED"
    found = (
        line.split()[1] for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))
    )
    if status in (1, 2) and (first := next(found, None)):  # 2: a file of tests cannot be imported
        return f"caught: {first.rpartition('/')[2]}"
    if status < 0:
        return f"caught: the tests die of signal {-status}"
    return f"NOT RUN: pytest exits with {status}"


def chosen(words: Sequence[str]) -> list[tuple[int, Mutant]]:
    """Return the rows that ``words`` name: numbers, or words of a fault or file; all without any."""
    return [
        (number, row)
        for number, row in enumerate(ROWS, start=1)
        if not words
        or any(str(number) == w if w.isdigit() else w in f"{row.file} {row.fault}" for w in words)
    ]


def preload() -> None:
    """Import what most tests import; never the package, which each run imports with its own fault."""
    os.environ.update(
        HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", ANONYMIZED_TELEMETRY="False"
    )
    warnings.simplefilter("ignore")
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


_trees: list[Tree] = []  # this process's own


def make_tree(root: Path, work: Path) -> None:
    """Make the tree of a process that judges rows."""
    _trees.append(Tree(root, Path(tempfile.mkdtemp(dir=work)) / "tree"))


def judge(mutant: Mutant, timeout: float) -> tuple[str, float]:
    """Return how one mutant fared, and the seconds that it took."""
    started = time.monotonic()
    return _trees[0].judged(mutant, timeout), time.monotonic() - started


def main() -> int:
    """Run the rows that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "rows", nargs="*", help="numbers, or words of a fault or file; all by default"
    )
    parser.add_argument("--jobs", type=int, default=1, help="rows at the same time")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds of a row; a hang is caught"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    parser.add_argument(
        "--no-check", action="store_true", help="do not run the tests unchanged first"
    )
    args = parser.parse_args()
    rows, missed = chosen(args.rows), []
    if not rows:
        parser.error(f"no row is called {' or '.join(args.rows)}")
    if len(rows) > FEW:
        preload()
    with tempfile.TemporaryDirectory(prefix="rasd-mutants-") as work:
        if not args.no_check:
            tests = sorted({test for _, row in rows for test in row.tests})
            status, printed = Tree(args.root, Path(work) / "whole").run(
                tests, args.timeout * len(tests)
            )
            if status != 0:
                print(
                    f"{printed}\nThe tests fail without any fault; mend them first.",
                    file=sys.stderr,
                )
                return 2
        print(
            "| row | fault | file | result | seconds |\n| --- | --- | --- | --- | --- |", flush=True
        )
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(args.jobs, fork, make_tree, (args.root, Path(work))) as pool:
            faults, limits = [row for _, row in rows], [args.timeout] * len(rows)
            for (number, row), (result, seconds) in zip(
                rows, pool.map(judge, faults, limits), strict=True
            ):
                print(
                    f"| {number} | {row.fault} | {row.file} | {result} | {seconds:.0f} |",
                    flush=True,
                )
                if not result.startswith("caught"):
                    missed.append(
                        f"{number}: {row.fault} ({row.file}); tests {', '.join(row.tests)}"
                    )
    print(f"\n{len(rows) - len(missed)} of {len(rows)} caught.", *missed, sep="\nnot caught, ")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
