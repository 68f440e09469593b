"""Figures of ``vllm_cpu.py``: by task and what drafts come from."""

from __future__ import annotations

from typing import Any

TASKS = {
    "a": "first questions over a collection",
    "b": "the same reworded",
    "c": "objects of one schema",
}
MODES = {
    "plain": "no drafts",
    "prompt": "prompt and answer",
    "chunks": "and 8 chunks that are not in the prompt",
    "memory": "prompt, answer, earlier answers",
    "memory, asked again": "the same, the question asked before",
    "ngram": "vLLM's n-gram",
}


def cells(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of each task and mode; the first token of an answer counts as a step."""
    plain = {(a["task"], a["number"]): a for a in answers if a["mode"] == "plain"}
    found = []
    for task in TASKS:
        for mode in MODES:
            rows = [a for a in answers if (a["task"], a["mode"]) == (task, mode)]
            if rows:
                base = [plain.get((task, a["number"])) for a in rows]
                found.append({"task": task, "mode": mode} | _cell(rows, base))
    return found


def _cell(rows: list[dict[str, Any]], base: list[dict[str, Any] | None]) -> dict[str, Any]:
    tokens = sum(len(a["ids"]) for a in rows)
    drafted, accepted = (sum(a[name] for a in rows) for name in ("drafted", "accepted"))
    same = [a["ids"] == b["ids"] for a, b in zip(rows, base, strict=True) if b]
    return {
        "answers": len(rows),
        "tokens": tokens,
        "drafted": drafted,
        "accepted": accepted,
        "tokens_per_step": tokens / (tokens - accepted),
        "acceptance": accepted / drafted if drafted else None,
        "same_ids": sum(same) if same else None,
        "decode_ms_per_token": 1000 * sum(a["decode_s"] for a in rows) / max(tokens - len(rows), 1),
    }


def vllm_rows(document: dict[str, Any]) -> list[list[str]]:
    """Return a row for each task and what is drafted from."""
    rows = [["task", "drafts from", "tokens a step", "accepted of drafted", "drafted a token", "same ids as without",
             "decode, ms a token"]]  # fmt: skip
    for cell in document["cells"]:
        rate = cell["acceptance"]
        rows.append([
            TASKS[cell["task"]], MODES[cell["mode"]], f"{cell['tokens_per_step']:.2f}",
            "-" if rate is None else f"{rate:.2f}", f"{cell['drafted'] / cell['tokens']:.2f}",
            "-" if cell["same_ids"] is None else f"{cell['same_ids']} of {cell['answers']}",
            f"{cell['decode_ms_per_token']:.0f}",
        ])  # fmt: skip
    return rows
