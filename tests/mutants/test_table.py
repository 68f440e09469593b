"""The table of mutants fits the package as it stands."""

from __future__ import annotations

import pytest
from mutants import PACKAGE, ROOT, ROWS, Mutant

AT_LEAST = 60


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_each_row_names_one_place_and_its_tests(row: Mutant) -> None:
    """The text to be mutated occurs exactly once, and the tests that must notice are there."""
    path = ROOT / PACKAGE / row.file
    places = path.read_text(encoding="utf-8").count(row.old) if path.is_file() else 0
    assert places == 1, (
        f"tests/mutants/mutants.py, {row.fault!r}: {row.old!r} occurs {places} times in {row.file}, but must occur "
        f"once. Adapt the row to the line that does this now (in another file, if it moved); if nothing does it any "
        f"more, put another fault of the same kind in its place."
    )
    missing = [test for test in row.tests if not (ROOT / "tests" / test).is_file()]
    assert not missing, (
        f"tests/mutants/mutants.py, {row.fault!r}: there is no {', '.join(missing)} below tests/. Name the file that "
        f"checks this now."
    )


def test_rows_are_enough_and_each_is_another_fault() -> None:
    """At least sixty faults, each with a name, a change and tests of its own."""
    assert len(ROWS) >= AT_LEAST
    assert len({row.fault for row in ROWS}) == len({(r.file, r.old) for r in ROWS}) == len(ROWS)
    assert all(row.tests for row in ROWS)
    assert not [row.fault for row in ROWS if row.old == row.new]
