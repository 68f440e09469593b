"""Questions over real documents, padded to a wanted length with other documents of the same file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

FILES = {
    "scientific_qa": "leval/scientific_qa.jsonl",
    "multidoc_qa": "leval/multidoc_qa.jsonl",
    "gov_report_summ": "leval/gov_report_summ.jsonl",
    "specbench_rag": "specbench/rag.jsonl",
    "specbench_summarization": "specbench/summarization.jsonl",
}
QUESTION_TOKENS = 250
"""Room for the question and the template where a document is cut."""


@dataclass(frozen=True, slots=True)
class Row:
    """A document (empty where the prompt stands alone) and what is asked about it."""

    document: str
    questions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt, as messages and as the ids that every engine decodes from."""

    document: int
    question: str
    messages: tuple[dict[str, str], ...]
    ids: tuple[int, ...]


def data_folder() -> Path | None:
    """Return the folder of the data: ``RASD_DATA``, else ``../shared/data`` beside the repository."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("RASD_DATA", default))
    return folder if folder.is_dir() else None


def data_or_exit(given: Path | None = None) -> Path:
    """Return the folder of the data, ``given`` or the usual one, or end the program and say what it needs."""
    folder = given or data_folder()
    if folder is None:
        sys.exit(
            "No data: set RASD_DATA to the folder that holds leval/ and specbench/, or pass it as --data where "
            "that is an option (see examples/benchmarks/README.md)."
        )
    return folder


def load_rows(task: str, folder: Path) -> list[Row]:
    """Read a task's file: L-Eval rows have a document, Spec-Bench rows a whole prompt."""
    rows = []
    for line in (folder / FILES[task]).read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        if "turns" in raw:
            rows.append(Row("", (raw["turns"][0],)))
        else:
            rows.append(Row(raw["input"], tuple(raw["instructions"])))
    return rows


def build_examples(
    rows: list[Row], tokenizer: Any, tokens: int, count: int, per_document: int = 2
) -> list[Example]:
    """Return ``count`` prompts of about ``tokens`` tokens, ``per_document`` in a row on each document.

    Padding stands first, the document behind it, the question at the end: the next question on a
    document shares everything but its last tokens. A document over the wanted length is skipped.
    """
    return list(islice(_examples(rows, tokenizer, tokens, per_document), count))


def shortened(rows: Iterable[Row], tokenizer: Any, tokens: int) -> list[Row]:
    """Cut documents that are too long for a prompt of ``tokens``: what is asked may be gone, how it is told is not."""
    most = max(tokens - QUESTION_TOKENS, tokens // 2)
    kept = []
    for row in rows:
        ids = tokenizer(row.document, add_special_tokens=False)["input_ids"]
        document = tokenizer.decode(ids[:most]) if len(ids) > most else row.document
        kept.append(replace(row, document=document))
    return kept


def _examples(rows: list[Row], tokenizer: Any, tokens: int, per_document: int) -> Iterator[Example]:
    for number, row in enumerate(rows):
        questions = row.questions[:per_document]
        longest = max(questions, key=len)
        needed = len(_encode(tokenizer, _messages(row.document, longest)))
        if needed > tokens:
            continue
        others = chain(rows[number + 1 :], rows[:number])
        padding = _padding((_body(r) for r in others), tokenizer, tokens - needed)
        text = f"{padding}\n\n{row.document}".strip()
        for question in questions:
            messages = _messages(text, question)
            ids = _encode(tokenizer, messages)
            yield Example(number, question, messages, tuple(ids))


def _body(row: Row) -> str:
    return row.document or row.questions[0]


def _messages(document: str, question: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": f"{document}\n\n{question}".strip()},)


def _encode(tokenizer: Any, messages: Iterable[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _padding(texts: Iterable[str], tokenizer: Any, tokens: int) -> str:
    ids: list[int] = []
    for text in texts:
        if len(ids) >= tokens:
            break
        ids += tokenizer(f"{text}\n\n", add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids[: max(tokens, 0)]))
