"""Every example runs as a newcomer would run it: offline, with the packaged models."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from smollm2 import fresh_smollm2

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(p for p in EXAMPLES.rglob("*.py") if p.parent.name != "benchmarks")
SAYS = {
    "langchain/rag.py": "steps of the target",
    "langchain/agent.py": "Name: search_notes",
    "langchain/structured_output.py": "Ticket(subject=",
    "langchain/side_by_side.py": "tokens a second in all",
    "llama_index/agent.py": "search_notes({'query':",
    "llama_index/query_engine.py": "steps of the target",
    "llama_index/structured_output.py": "Ticket(subject=",
}


def test_every_example_is_listed():
    """A script that is not tried here would rot."""
    assert {p.relative_to(EXAMPLES).as_posix() for p in SCRIPTS} == set(SAYS)


@pytest.fixture(scope="module")
def kept_model():
    """Keep the model from one example to the next."""
    return fresh_smollm2()


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.usefixtures("kept_model")
@pytest.mark.parametrize("name", sorted(SAYS))
def test_an_example_runs(name, monkeypatch, capsys):
    """It ends by itself and prints what it promises."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out
