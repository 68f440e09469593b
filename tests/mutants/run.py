"""Apply the faults of the table one at a time and name those that no test catches: ``make mutants``.

Works on copies of the checkout, which is left alone. Prints a markdown table and exits with 1 if a fault was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from mutants import PACKAGE, ROOT, ROWS, Mutant

COPIED = (PACKAGE, "tests", "examples", "docs", "pyproject.toml", "README.md", "Makefile")
LOGS = ("*.pyc", "__pycache__", ".rasd")


def copied(root: Path, folder: Path) -> Path:
    """Copy what tests read from the checkout ``root`` into ``folder``."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns(*LOGS))
        elif source.is_file():
            shutil.copy2(source, folder / name)
    return folder


def run_tests(
    tree: Path, tests: Sequence[str], timeout: float, data: Path
) -> tuple[int | None, str]:
    """Return pytest's exit status in ``tree``, ``None`` if it had to be killed, and what it printed."""
    # No bytecode: a mutant of the same size, written within the same second, would run its predecessor's.
    environment = {
        "RASD_DATA": str(data), "HF_HUB_OFFLINE": "1", **os.environ,
        "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        [*command, *(f"tests/{test}" for test in tests)],
        cwd=tree, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    return process.returncode, printed


def result_of(status: int | None, printed: str) -> str:
    """Return how a mutant fared: caught, and by which test; or missed."""
    if status is None:
        return "caught: the tests hang"
    if status == 0:
        return "MISSED"
    failed = [
        line.split()[1] for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))
    ]
    if status == 1 and failed:
        return f"caught: {failed[0].rpartition('/')[2]}"
    if status == 1 or (status == 2 and "rror" in printed):  # pytest's own codes
        return "caught: the tests cannot be collected"
    return f"NOT RUN: pytest exits with {status}"


def judged(mutant: Mutant, tree: Path, timeout: float, data: Path) -> str:
    """Run the tests of one mutant in ``tree``, which is as before afterwards."""
    path = tree / PACKAGE / mutant.file
    before = path.read_text(encoding="utf-8")
    if before.count(mutant.old) != 1:
        return "NOT RUN: the old text is not there once"
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return result_of(*run_tests(tree, mutant.tests, timeout, data))
    finally:
        path.write_text(before, encoding="utf-8")


def chosen(words: Sequence[str]) -> list[tuple[int, Mutant]]:
    """Return the rows that ``words`` name: their numbers, or words of the fault or the file; all without any."""
    return [
        (number, row)
        for number, row in enumerate(ROWS, start=1)
        if not words
        or any(str(number) == w if w.isdigit() else w in f"{row.file} {row.fault}" for w in words)
    ]


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
    rows, data = chosen(args.rows), args.root.parent / "shared" / "data"
    if not rows:
        parser.error(f"no row is called {' or '.join(args.rows)}")
    with tempfile.TemporaryDirectory(prefix="rasd-mutants-") as work:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(args.jobs):
            trees.put(copied(args.root, Path(work) / str(job)))
        if not args.no_check:
            tree, tests = trees.get(), sorted({test for _, row in rows for test in row.tests})
            status, printed = run_tests(tree, tests, args.timeout * len(tests), data)
            trees.put(tree)
            if status != 0:
                print(
                    f"{printed}\nThe tests fail without any fault; mend them first.",
                    file=sys.stderr,
                )
                return 2

        def run(numbered: tuple[int, Mutant]) -> tuple[int, Mutant, str, float]:
            tree, started = trees.get(), time.perf_counter()
            try:
                return (
                    *numbered,
                    judged(numbered[1], tree, args.timeout, data),
                    time.perf_counter() - started,
                )
            finally:
                trees.put(tree)

        print(
            "| row | fault | file | result | seconds |\n| --- | --- | --- | --- | --- |", flush=True
        )
        missed = []
        with ThreadPoolExecutor(args.jobs) as pool:
            for number, mutant, result, seconds in pool.map(run, rows):
                print(
                    f"| {number} | {mutant.fault} | {mutant.file} | {result} | {seconds:.0f} |",
                    flush=True,
                )
                if not result.startswith("caught"):
                    missed.append(
                        f"{number}: {mutant.fault} ({mutant.file}), tests {', '.join(mutant.tests)}"
                    )
    print(
        f"\n{len(rows) - len(missed)} of {len(rows)} caught. Missed: {'; '.join(missed) or 'none'}."
    )
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
