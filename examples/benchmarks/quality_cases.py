"""Questions over whole documents, and what the teacher of knowledge transfer reads for each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rasd_integrations.demo.embeddings import MiniLM
from rasd_integrations.text.prompt.template import ChatTemplate

CHUNK_TOKENS = 128
RETRIEVALS = ("good", "poor", "empty")
HALVES = ("even", "odd", "all")
_ASK = "Answer in one short sentence.\n\nQuestion: "


@dataclass(frozen=True, slots=True)
class Question:
    """A question over a document of a task.

    Attributes:
        task: Name of the file in leval/.
        document: Line of the file.
        number: Of the question in the line.
        text: What is asked.
        reference: What is right.
    """

    task: str
    document: int
    number: int
    text: str
    reference: str


class Documents:
    """A task's documents and questions, its chunks ranked for each question.

    Attributes:
        questions: In the file's order.
    """

    def __init__(
        self, folder: Path, task: str, half: str, count: int, template: ChatTemplate
    ) -> None:
        """Read at most ``count`` questions of the documents with even or odd numbers, or of all."""
        path = folder / "leval" / f"{task}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        self._rows = [json.loads(line) for line in lines]
        self._template, self._embed = template, MiniLM()
        self._chunks: dict[int, tuple[list[str], torch.Tensor]] = {}
        self._asked: tuple[Question | None, torch.Tensor] = None, torch.empty(0)
        wanted = [n for n in range(len(lines)) if half == "all" or n % 2 == HALVES.index(half)]
        self.questions = [
            Question(task, n, i, text.strip(), reference.strip())
            for n in wanted
            for i, (text, reference) in enumerate(
                zip(self._rows[n]["instructions"], self._rows[n]["outputs"], strict=True)
            )
            if reference.strip()
        ][:count]

    def whole(self, question: Question, room: int) -> list[int]:
        """Return the target's prompt: the document, its middle left out beyond ``room`` tokens."""
        ids = self._template.encode_chunk(self._rows[question.document]["input"])
        if len(ids) > room:
            ids = [*ids[: room // 2], *ids[-(room - room // 2) :]]
        return self._prompt(str(self._template.tokenizer.decode(ids)), question)

    def short(self, question: Question, retrieval: str, k: int, skip: int = 0) -> list[int]:
        """Return the teacher's prompt.

        Args:
            question: What is asked.
            retrieval: "good": the ``k`` chunks nearest to the question; "poor": the farthest; "empty": none.
            k: Chunks.
            skip: Nearer ones that are left out.
        """
        if retrieval == "empty":
            return self._prompt("", question)
        texts, _ = self._chunked(question.document)
        order = (
            self._nearness(question)
            .argsort(descending=retrieval == "good")
            .tolist()[skip : skip + k]
        )
        return self._prompt("\n\n".join(texts[n] for n in sorted(order)), question)

    def near(self, question: Question, k: int) -> list[float]:
        """Return the cosines of the nearest chunk and the k-th nearest."""
        ranked = self._nearness(question).sort(descending=True)[0]
        return [round(float(ranked[min(n, len(ranked) - 1)]), 4) for n in (0, max(k - 1, 0))]

    def _nearness(self, question: Question) -> torch.Tensor:
        """Return the cosine of each chunk of the document; embedded once for all settings of a question."""
        if self._asked[0] is not question:
            _, vectors = self._chunked(question.document)
            found = vectors @ torch.tensor(self._embed([question.text]))[0]
            self._asked = question, found
        return self._asked[1]

    def _prompt(self, text: str, question: Question) -> list[int]:
        content = f"{text}\n\n{_ASK}{question.text}".strip()
        return self._template.encode_messages([{"role": "user", "content": content}])

    def _chunked(self, document: int) -> tuple[list[str], torch.Tensor]:
        if document not in self._chunks:
            ids = self._template.encode_chunk(self._rows[document]["input"])
            texts = [
                str(self._template.tokenizer.decode(ids[start : start + CHUNK_TOKENS]))
                for start in range(0, len(ids), CHUNK_TOKENS)
            ]
            self._chunks[document] = texts, torch.tensor(self._embed(texts))
        return self._chunks[document]


def by_turns(tasks: Sequence[Documents]) -> Iterator[tuple[Documents, Question]]:
    """Yield the questions document by document, a document of each task in turn.

    A run that is stopped early then has seen as many of each task.
    """
    groups: list[list[tuple[Documents, list[Question]]]] = []
    for documents in tasks:
        found: dict[int, list[Question]] = {}
        for question in documents.questions:
            found.setdefault(question.document, []).append(question)
        groups.append([(documents, questions) for questions in found.values()])
    for turn in range(max(map(len, groups), default=0)):
        for group in groups:
            for documents, questions in group[turn : turn + 1]:
                yield from ((documents, question) for question in questions)


def key_of(question: Question, retrieval: str, k: int) -> list[Any]:
    """Return what tells a result from all others of a run."""
    return [question.task, question.document, question.number, retrieval, k]
