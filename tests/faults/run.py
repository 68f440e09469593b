"""Crash, damage and starve the package, and count what goes wrong: ``make faults``.

Prints a table and exits with 1 if an answer was wrong, a file was lost or an exception was not the package's own.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import files
import pressure

GROUPS = {
    "kill": files.kill_cases,
    "disk": files.disk_cases,
    "damage": files.damage_cases,
    "shared": files.shared_cases,
    "processes": pressure.process_cases,
    "memory": pressure.memory_cases,
}


def main() -> int:
    """Run the groups that are asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; all by default")
    parser.add_argument("--runs", type=int, default=20, help="tries of each case")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(GROUPS):
        parser.error(f"unknown groups: {', '.join(sorted(unknown))}")
    warnings.simplefilter("ignore")  # what is said in a warning is right here; errors are counted
    logging.disable(logging.CRITICAL)
    print(
        "| case | runs | wrong answers | lost files | foreign errors | refused by an error of ours |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    bad, notes = 0, []
    for name in args.groups or GROUPS:
        with tempfile.TemporaryDirectory(prefix="rasd-faults-") as work:
            runs = max(1, args.runs // 5) if name == "damage" else args.runs
            try:
                for row in GROUPS[name](Path(work), runs):
                    print(
                        f"| {row.case} | {row.runs} | {row.wrong} | {row.lost} | {row.foreign} | {row.refused} |",
                        flush=True,
                    )
                    bad += row.wrong + row.lost + row.foreign
                    notes += [f"{row.case}: {note}" for note in row.notes[:5]]
            except PermissionError as err:
                print(f"| {name} | not run: {err} | | | | |", flush=True)
    if notes:
        print("\n" + "\n".join(notes), file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
