"""The comparison of grammar libraries: its cases are right, and the command runs."""

from __future__ import annotations

import json

import masks
import pytest
from grammars import LLGuidance
from schemas import CASES
from scripted import scripted_tokenizer

pytest.importorskip("llguidance")
UNCHECKED = {"date-time", "time", "duration", "email", "uri"}  # jsonschema needs more packages
REFUSED = {
    "property names", "set (uniqueItems)", "contains", "pattern with lookahead", "decimal (pydantic)",
    "not", "if/then", "dependentRequired",
}  # fmt: skip


def test_cases_are_right():
    """Values that are called valid are, and the others are not, says jsonschema."""
    jsonschema = pytest.importorskip("jsonschema")
    drafts = {"(draft 4)": "Draft4Validator", "(draft 7 ": "Draft7Validator"}
    wrong = []
    for name, case in CASES.items():
        kind = next((v for mark, v in drafts.items() if mark in name), "Draft202012Validator")
        validator = getattr(jsonschema, kind)
        valid = validator(case.schema, format_checker=validator.FORMAT_CHECKER).is_valid
        wrong += [(name, value) for value in case.valid if not valid(value)]
        if name not in UNCHECKED:
            wrong += [(name, value) for value in case.invalid if valid(value)]
    assert wrong == []


def test_no_schema_is_followed_wrongly():
    """What the package's grammar library does not follow it refuses; no more than was known when it was chosen."""
    tokenizer = scripted_tokenizer()
    verdicts = masks.coverage(LLGuidance(tokenizer), tokenizer)
    wrong = {name: v for name, v in verdicts.items() if v != "ok" and not v.startswith("refused")}
    assert wrong == {}
    assert {name for name, v in verdicts.items() if v != "ok"} <= REFUSED


@pytest.mark.slow
def test_the_command_prints_figures_and_skips_what_is_missing(monkeypatch, capsys, tmp_path):
    """Without xgrammar the table has one column, says why, and the last line is the JSON document."""
    monkeypatch.setattr(masks, "load_tokenizer", lambda name: scripted_tokenizer())
    real = masks.importlib.import_module

    def without(name, *args):
        if name == "xgrammar":
            msg = "No module named 'xgrammar'"
            raise ModuleNotFoundError(msg, name=name)
        return real(name, *args)

    monkeypatch.setattr(masks.importlib, "import_module", without)
    out = tmp_path / "masks.json"
    masks.main(["--model", "tiny", "--repeats", "2", "--no-coverage", "--out", str(out)])
    printed = capsys.readouterr()
    assert "xgrammar is skipped: No module named 'xgrammar'" in printed.err
    document = json.loads(printed.out.splitlines()[-1])
    assert document == json.loads(out.read_text(encoding="utf-8"))
    assert list(document["libraries"]) == ["llguidance"]
    answers = document["libraries"]["llguidance"]["answers"]
    assert all(0 < a["mask_us"]["median"] <= a["mask_us"]["max"] for a in answers.values())
    assert all(0 < a["forced_characters"] < a["characters"] for a in answers.values())
