"""The harness of knowledge transfer: its figures, and that a run which was killed ends as if it had not been."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quality
import quality_figures as figures
import quality_weights as weights
import report
import torch
from quality_cases import Documents, by_turns
from quality_pair import RULES, TARGET, _further
from tiny import tiny_tokenizer

from rasd_integrations.text.prompt.template import ChatTemplate
from rasd_integrations.transfer import TransferState


@pytest.mark.parametrize(
    ("answer", "reference", "f1", "exact", "rouge"),
    [
        ("The cat sat.", "a cat sat", 100, 100, 100),
        ("sat cat", "the cat sat", 100, 0, 50),
        ("a dog", "the cat sat", 0, 0, 0),
        ("cat cat cat", "cat", 50, 0, 50),
        ("", "cat", 0, 0, 0),
        ("x cat y sat z", "cat sat", 100 * 4 / 7, 0, 100 * 4 / 7),
    ],
)
def test_answers_are_compared_by_their_words(answer, reference, f1, exact, rouge):
    """Without articles, case and punctuation."""
    assert figures.f1(answer, reference) == pytest.approx(f1)
    assert figures.exact(answer, reference) == exact
    assert figures.rouge_l(answer, reference) == pytest.approx(rouge)


def test_intervals_are_of_resampled_documents():
    """Questions of one document move together: two documents that differ give a wide interval, equal ones none."""
    same = figures.change([[(1.0, 2)] * 5, [(1.0, 2)] * 3])
    assert same == {"mean": 0.5, "low": 0.5, "high": 0.5}
    apart = figures.change([[(0.0, 1)] * 50, [(1.0, 1)] * 50])
    assert (apart["mean"], apart["low"], apart["high"]) == (0.5, 0.0, 1.0)


def row(document: int, number: int, nats: float, text: str = "cat") -> dict:
    return {
        "key": ["qa", document, number, "good", 6], "reference": "cat", "tokens": [[0.0] * 4] * 2,
        "nats": {TARGET: 4.0, "cautious": nats}, "extra": {"sets": [-1.0, -0.5]},
        "answers": {
            TARGET: {"text": "dog", "decode_s": 1.0, "tokens": 2, "changed": 0.0},
            "cautious": {"text": text, "decode_s": 0.5, "tokens": 2, "changed": 0.5},
        },
    }  # fmt: skip


def test_the_summary_is_the_change_against_the_target():
    """Nats a token, points a question, by task and of all; tables and picture show it."""
    found = figures.summary([row(0, 0, 3.0), row(0, 1, 4.0, "dog"), row(1, 0, 2.0)])
    cell = found["cells"]["qa, good, 6 chunks"]
    assert cell["questions"] == 3
    assert cell["nats"]["mean"] == 2.0
    assert cell["nats_change"]["cautious"]["mean"] == pytest.approx(-0.5)
    assert cell["nats_change"]["sets"]["mean"] == pytest.approx((1.5 - 4.0) / 2)
    assert cell["f1_change"]["cautious"]["mean"] == pytest.approx(200 / 3, abs=1e-3)
    assert cell["answers"]["cautious"] == {"ms_a_token": 250.0, "changed": 0.5}
    assert list(found["cells"]) == ["qa, good, 6 chunks", "all tasks, good, 6 chunks"]
    shown = report.table(found, "quality_nats")
    assert "| target | 2.000 | 2.000 |" in shown
    assert "| cautious | -0.500 [" in shown
    assert "| cautious | +66.67 [" in report.table(found, "quality_f1")


def test_routing_is_compared_to_both_fixed_choices():
    """Which answer it takes, what it loses against the better one, and what it reads."""
    rows = []
    for n, (logprob, short, question) in enumerate(
        [(-0.1, "cat", "Who?"), (-3.0, "dog", "Who?"), (-0.1, "dog", "Summarise it.")]
    ):
        made = row(n, 0, 3.0) | {"question": question, "prompt_tokens": 1000, "short_tokens": 100}
        chunks = {"text": short, "logprob": logprob, "tokens": 4, "decode_s": 1.0, "changed": 0.0}
        made["answers"] |= {"chunks alone": chunks}
        made["answers"][TARGET]["text"] = "cat" if n == 1 else "dog"
        rows.append(made)
    found = figures.routed(rows)
    means = {name: value["mean"] for name, value in found["f1"].items()}
    assert means == {
        TARGET: pytest.approx(100 / 3, abs=1e-3),
        "chunks alone": pytest.approx(100 / 3, abs=1e-3),
        "route": pytest.approx(200 / 3, abs=1e-3),
    }
    assert found["documents_share"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["tokens_read"] == pytest.approx((100 + 1100 + 1000) / 3000, abs=1e-3)


def test_weights_are_fitted_on_one_half_and_judged_on_the_other():
    """A teacher that is right on every document wins by a small slope of the entropies; "confidence" is the measure."""
    rows = [
        {"key": ["qa", n, 0, "good", 6], "near": [0.5, 0.3], "tokens": [[-3.0, -0.1, 0.5, 0.5]] * 4, "extra": {"x": [-0.1] * 4}}
        for n in range(8)
    ]  # fmt: skip
    found = weights.judged(rows)
    confidence = weights.nats(rows[0], weights.slope, weights.CONFIDENCE)
    assert confidence == pytest.approx(-4 * math.log((math.exp(-3) + math.exp(-0.1)) / 2))
    assert found["entropies, slope and least weight"]["numbers"][1] == 0
    assert found["agreement over the last tokens"]["numbers"] == [1, 1]
    for name in ("agreement over the last tokens", "gap of the ranks", "x"):
        assert found[name]["against_confidence"]["high"] < -0.05


def test_the_picture_is_drawn(tmp_path):
    """With intervals of both metrics."""
    pytest.importorskip("matplotlib")
    found = figures.summary([row(0, 0, 3.0), row(1, 0, 2.0)])
    drawn = figures.draw_quality(found, tmp_path / "q.png")
    assert drawn.stat().st_size > 5000


@pytest.mark.parametrize("name", RULES)
def test_each_rule_of_the_harness_is_a_distribution(name):
    """Of any two, also where one of them is sure."""
    p, q = torch.randn(2, 20, 9, generator=torch.Generator().manual_seed(1)).mul(4).softmax(-1)
    p[0] = torch.eye(9)[0]
    joint = RULES[name](p, q, TransferState())
    torch.testing.assert_close(joint.sum(-1), torch.ones(20))
    assert (joint >= 0).all()
    further = _further(p, q, {"empty": q.flip(0), "set 0": q, "set 1": p})
    assert len(further) == 5
    assert all(
        torch.allclose(joint.sum(-1), torch.ones(20), atol=1e-5) for joint in further.values()
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two tasks of three short documents each."""
    folder = tmp_path / "data" / "leval"
    folder.mkdir(parents=True)
    for task in ("one", "two"):
        rows = [
            {
                "input": " ".join(
                    f"Room {i} of {task} {n} holds thing {i * n}." for i in range(30)
                ),
                "instructions": [f"What does room {n} hold?", "And which room is last?"],
                "outputs": [f"thing {n * n}", "room 29"],
            }
            for n in range(3)
        ]
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{task}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "data"


def test_questions_come_by_turns_of_documents(data, monkeypatch):
    """A document of each task in turn; the halves are documents by number."""
    template = ChatTemplate(tiny_tokenizer())
    tasks = [Documents(data, task, "all", 5, template) for task in ("one", "two")]
    asked = [(q.task, q.document) for _, q in by_turns(tasks)]
    assert asked == [
        pair
        for n in range(3)
        for task in ("one", "two")
        for pair in [(task, n)] * (2 if n < 2 else 1)
    ]
    odd = Documents(data, "one", "odd", 9, template)
    assert {question.document for question in odd.questions} == {1}


@pytest.mark.real
@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(data, tmp_path):
    """Killed in its middle and started again, and with a line cut short: the same table as in one go."""
    here = Path(quality.__file__)
    command = [
        sys.executable, str(here), "--data", str(data), "--tasks", "one,two", "--answers", "4", "--chunks", "1,2",
        "--retrieval", "good,empty", "--rules", "target;cautious;cautious, undrafted", "--further", "--out",
    ]  # fmt: skip
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    subprocess.run([*command, str(whole)], check=True, capture_output=True, timeout=600)
    process = subprocess.Popen(
        [*command, str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not cut.exists() or cut.read_text(encoding="utf-8").count("\n") < 4:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with cut.open("a", encoding="utf-8") as out:
        out.write('{"key": ["one", 2')
    subprocess.run([*command, str(cut)], check=True, capture_output=True, timeout=600)
    found = [json.loads(path.with_suffix(".json").read_text()) for path in (whole, cut)]
    for document in found:
        for cell in document["cells"].values():
            assert cell.pop("answers")["cautious"]["ms_a_token"] > 0
    assert found[0]["cells"] == found[1]["cells"]
    assert len(found[0]["cells"]) == 9
    other = subprocess.run(
        [*command, str(cut), "--half", "odd"],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert other.returncode == 1
    assert "other options" in other.stderr
