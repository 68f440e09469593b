"""A store that can be listed, and a memory over texts that are token ids."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rasd_integrations.datastores.tokens.memory import Memory
from rasd_integrations.datastores.tokens.quiet import Quiet
from rasd_integrations.drafters import AnswersDrafter, CollectionDrafter
from rasd_integrations.drafters.base import DraftSession
from rasd_integrations.types import Chunk, DraftContext


class IdsTokenizer:
    """Encodes a text of numbers to these ids."""

    def __call__(self, text: str) -> list[int]:
        return [int(word) for word in text.split() if word.isdigit()]

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, ids))


def text_of(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


class Listed:
    """Texts by id, with a tenant each; ``calls`` counts what was asked for."""

    def __init__(self, texts: Mapping[str, str] | Sequence[str] = (), tenant: str = "") -> None:
        named = texts if isinstance(texts, Mapping) else {t: t for t in texts}
        self.held = {name: (text, tenant) for name, text in named.items()}
        self.calls = {"keys": 0, "read": 0}
        self.before: Callable[[], object] = lambda: None

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        return []

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        return []

    def fingerprint(self) -> str:
        return "listed"

    def origin(self) -> Hashable:
        return id(self)

    def keys(self, most: int, *, filter: Any = None) -> Sequence[Hashable]:
        self.calls["keys"] += 1
        self.before()
        return [n for n, (_, t) in list(self.held.items()) if filter in (None, t)][-most:]

    def read(self, keys: Sequence[Hashable], *, filter: Any = None) -> Mapping[Hashable, str]:
        self.calls["read"] += 1
        self.before()
        held = dict(self.held)
        return {n: held[n][0] for n in keys if n in held and filter in (None, held[n][1])}  # type: ignore[index]


def new_memory(**how: Any) -> Memory:
    return Memory(IdsTokenizer(), Quiet(), **how)


def settled(memory: Memory, source: object, filter: Any = None, *, within: float = 10.0) -> None:
    """Wait until all of ``source`` is read."""
    memory.collection(source, filter)
    collection = memory._collection(source, filter)  # type: ignore[arg-type]
    until = time.monotonic() + within
    while collection._is_working:
        assert time.monotonic() < until, "the collection is not read in time"
        time.sleep(0.002)


def drafted(
    memory: Memory, ids: Sequence[int], source: object = None, filter: Any = None, *, n: int = 4
):
    """Return the tokens that the collection proposes after ``ids``, once a new answer's check is done."""
    settled(memory, source, filter)
    context = DraftContext(prompt_ids=tuple(ids), source=source, filter=filter)
    session = CollectionDrafter(memory).start(context)
    settled_check(memory, source, filter)
    return session.propose(n).token_ids


def settled_check(memory: Memory, source: object, filter: Any = None) -> None:
    collection = memory._collection(source, filter)  # type: ignore[arg-type]
    until = time.monotonic() + 10
    while collection._checked < collection._asked:
        assert time.monotonic() < until
        time.sleep(0.001)


def answers_drafter(*rows: Sequence[int]) -> AnswersDrafter:
    """Return a drafter from these answers."""
    memory = new_memory()
    for row in rows:
        memory.answers.add([], row)
    return AnswersDrafter(memory)


class FromSource(CollectionDrafter):
    """Drafts from one source, whatever the context's is."""

    def __init__(self, *rows: Sequence[int]) -> None:
        memory = new_memory()
        super().__init__(memory)
        self._source = Listed([text_of(row) for row in rows])
        settled(memory, self._source)

    def start(self, context: DraftContext) -> DraftSession:
        session = super().start(replace(context, source=self._source))
        settled_check(self._memory, self._source)
        return session
