"""Forked processes: they answer, or say at once why they cannot; none hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "forks.py"
LOADED_BEFORE = "DecodingError: This model was loaded in process"
LOST_TEAM = "ConfigurationError: This process was forked by a thread that had run a model"


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_answers_or_says_at_once_why_it_cannot():
    """Fault 30: before, after and during an answer; the parent's own answers are not touched."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
    reports = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    answers = [report["said"] for report in reports if report["case"] == "parent"]
    assert len(answers) == 2
    assert answers[0] == answers[1]
    expected = {
        "before any answer": answers[0],
        "parent": answers[0],
        "loaded before": LOADED_BEFORE,
        "after an answer": LOADED_BEFORE,
        "after an answer, another model": LOST_TEAM,
        "after an answer, another model, one thread": answers[0],
        "during an answer": LOADED_BEFORE,
        "during an answer, another model, one thread": answers[0],
    }
    assert {report["case"] for report in reports} == set(expected)
    for report in reports:
        wanted, said = expected[report["case"]], report["said"]
        assert said == wanted if isinstance(wanted, list) else said.startswith(wanted), report
