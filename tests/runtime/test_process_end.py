"""Processes that end in the midst of answers: code 0 or 130, no hang, no abort."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "exits.py"
QUICK = ("astream left early", "Ctrl-C in ChatRASD.batch", "exit in mid-answer")
FAILS_ITSELF = "exit with an error in mid-answer"


def check_exits(executor: str, runs: int, *cases: str) -> None:
    """Run cases in a process of their own, which imports once and forks; see that each ends as it should."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), executor, str(runs), *cases]
    out = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=True).stdout
    reports = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(reports) >= runs * len(cases)
    for report in reports:
        fine = {1} if report["case"] == FAILS_ITSELF else {0, 130}
        assert report["code"] in fine, report
        assert "Fatal Python error" not in report["stderr"], report
        assert "terminate called" not in report["stderr"], report


@pytest.mark.slow
def test_a_process_that_ends_in_mid_answer_ends_well():
    """Fault 5: the cases that were seen to abort or to wait for whole answers, once each."""
    check_exits("eager", 1, *QUICK)


@pytest.mark.soak
@pytest.mark.parametrize("executor", ["eager", "openvino"])
def test_processes_end_well_however_often(executor):
    """Fault 5: every case, 20 times."""
    check_exits(executor, 20)
