"""The figures of ``vllm_cpu.py``."""

from __future__ import annotations

from typing import Any

import pytest
import report
import vllm_cpu
from vllm_figures import cells


def answer(mode: str, number: int, ids: list[int], drafted: int, accepted: int) -> dict[str, Any]:
    counts = {"drafted": drafted, "accepted": accepted, "decode_s": 0.3}
    return {"task": "b", "mode": mode, "number": number, "ids": ids, **counts}


def test_tokens_a_step_are_summed_over_answers_and_compared_with_those_without_drafts() -> None:
    """10 tokens of which 4 were accepted drafts took 6 steps; one of two answers is another."""
    answers = [
        answer("memory", 0, [1, 2, 3, 4], 3, 2),
        answer("memory", 1, [1, 2, 3, 4, 5, 9], 5, 2),
        answer("plain", 0, [1, 2, 3, 4], 0, 0),
        answer("plain", 1, [1, 2, 3, 4, 5, 6], 0, 0),
    ]
    plain, memory = cells(answers)
    assert (plain["tokens_per_step"], plain["acceptance"], plain["same_ids"]) == (1.0, None, 2)
    assert memory["tokens_per_step"] == pytest.approx(10 / 6)
    assert (memory["acceptance"], memory["same_ids"]) == (0.5, 1)
    assert memory["decode_ms_per_token"] == pytest.approx(1000 * 0.6 / 8)
    assert report.table({"cells": [plain, memory]}, "vllm").splitlines()[2:] == [
        "| the same reworded | no drafts | 1.00 | - | 0.00 | 2 of 2 | 75 |",
        "| the same reworded | prompt, answer, earlier answers | 1.67 | 0.50 | 0.80 | 1 of 2 | 75 |",
    ]


def test_an_engine_without_plain_answers_beside_it_is_compared_with_none() -> None:
    """The column is empty, not zero."""
    (only,) = cells([answer("ngram", 0, [1, 2], 1, 1)])
    assert only["same_ids"] is None
    assert "| - |" in report.table({"cells": [only]}, "vllm")


def test_each_mode_has_a_memory_of_its_own_but_the_pipelines() -> None:
    """A question asked again finds its own first answer only; those of a pipeline find all before them."""
    row = {"ids": [1], "max_tokens": 2, "schema": None, "chunks": [3, -1]}
    found = {task: [dict(row), dict(row)] for task in "abc"}
    asked = [*vllm_cpu.asks(found, "ours")]
    spaces: dict[str, set[tuple[str, str, int]]] = {}
    for ask in asked:
        if ask["mode"] != "plain":
            space = ask["extra"]["rasd_namespace"]
            spaces.setdefault(space, set()).add((ask["task"], ask["mode"], ask["number"]))
    assert spaces["a0"] == {("a", "prompt", 0), ("a", "memory, asked again", 0)}
    assert {task for task, _, _ in spaces["pipeline ab"]} == {"a", "b"}
    assert {key for key in spaces if len(spaces[key]) > 2} == {"pipeline ab"}
    assert [ask["extra"] for ask in asked if ask["mode"] == "plain"] == [{"rasd_off": 1}] * 6
    assert {ask["mode"] for ask in vllm_cpu.asks(found, "ngram")} == {"ngram"}
