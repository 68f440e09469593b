"""Recorded prompt shapes of LangChain and LlamaIndex pipelines, written down by hand, and a store in a list."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rasd_integrations.config import ContextMode, RetrievalConfig
from rasd_integrations.prompting import Prompt, PromptHints, PromptPlan, PromptPlanner
from rasd_integrations.retrieval import GuardedSource
from rasd_integrations.types import Chunk

_TOWERS = [
    ("Arkona", 1827, "Karl Schinkel", 19),
    ("Roker", 1903, "Henry Wake", 23),
    ("Eddystone", 1882, "James Douglass", 49),
    ("Cordouan", 1611, "Louis Foix", 68),
    ("Kullen", 1900, "Magnus Dahlander", 15),
    ("Lindau", 1856, "Eduard Rueber", 33),
    ("Fastnet", 1904, "William Douglass", 54),
    ("Skerryvore", 1844, "Alan Stevenson", 48),
    ("Hercules", 1791, "Eustaquio Giannini", 55),
    ("Lanterna", 1543, "Francesco Gandria", 77),
    ("Chersonesus", 1816, "Leontiy Spafaryev", 36),
    ("Minicoy", 1885, "Thomas Brassey", 47),
]
FACTS = [
    f"The {name} lighthouse of {year} is {height} metres high and was planned by {by}."
    for name, year, by, height in _TOWERS
]
QUESTION = "Who planned the Kullen lighthouse?"
RANKED = tuple(
    Chunk(FACTS[i], id=f"fact-{i}", rank=rank, metadata={"source": "towers.txt", "start_index": i})
    for rank, i in enumerate([4, 1, 0, 2, 3, 5, 6, 7, 8, 9, 10, 11])
)
BEST = [FACTS[1], FACTS[4]]
"""The two best chunks, in the order of the prompt."""


def count_words(text: str) -> int:
    """Count tokens of a model whose tokens are words."""
    return len(text.split())


class ListSource:
    """A store that returns its list for every question, and knows documents by their `source`."""

    def __init__(self, chunks: Sequence[Chunk], documents: Sequence[Chunk] = ()) -> None:
        self.chunks = list(chunks)
        self.documents = list(documents)
        self.queries: list[tuple[str, int, Any]] = []
        self.filters: list[Any] = []

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        self.queries.append((query, k, filter))
        return self.chunks[:k]

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        self.filters.append(filter)
        source = chunk.metadata.get("source")
        return [c for c in self.documents if source and c.metadata.get("source") == source]

    def fingerprint(self) -> str:
        return "list"


class FaultySource(ListSource):
    """A store that does something else than search."""

    def __init__(self, fault: Callable[[], Any]) -> None:
        super().__init__(())
        self.fault = fault

    def search(self, query: str, k: int, *, filter: Any = None) -> list[Chunk]:
        return self.fault()

    def document(self, chunk: Chunk, *, filter: Any = None) -> list[Chunk]:
        return self.fault()


SMALL = RetrievalConfig(gate_tokens=60, chunk_tokens=16, gate_share=0.7)
"""Two facts fit in the drafter's prompt."""


def planned(
    prompt: Prompt,
    hints: PromptHints | None = None,
    source: ListSource | None = None,
    *,
    context: ContextMode = "prompt",
    room: int = 8192,
    wants: bool = True,
    **options: Any,
) -> PromptPlan:
    retrieval = replace(SMALL, **options)
    guarded = None if source is None else GuardedSource(source, retrieval.timeout_s)
    planner = PromptPlanner(guarded, retrieval, context, count_words)
    return planner.plan(prompt, hints=hints, room=room, wants_drafter_prompt=wants)


def failing() -> Any:
    msg = "the store is on fire"
    raise ConnectionError(msg)


def hanging() -> Any:
    time.sleep(0.5)


def human(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def tool_call(arguments: Any) -> dict[str, Any]:
    function = {"name": "search", "arguments": arguments}
    call = {"id": "c1", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "c1"}


RULE = "---------------------"
LI_SYSTEM = (
    "You are an expert Q&A system that is trusted around the world.\nAlways answer the query using the "
    "provided context information, and not prior knowledge.\nSome rules to follow:\n1. Never directly "
    "reference the given context in your answer.\n2. Avoid statements like 'Based on the context, ...' or "
    "'The context information ...' or anything along those lines."
)


def li_text(context: str) -> str:
    return (
        f"Context information is below.\n{RULE}\n{context}\n{RULE}\nGiven the context information and not "
        f"prior knowledge, answer the query.\nQuery: {QUESTION}\nAnswer: "
    )


def li_summary(context: str) -> str:
    return li_text(context).replace("is below", "from multiple sources is below")


def joined(facts: Sequence[str]) -> str:
    return "\n\n".join(facts)


def sourced(facts: Sequence[str]) -> str:
    return "\n\n".join(f"Source: {{'source': 'towers.txt'}}\nContent: {fact}" for fact in facts)


@dataclass(frozen=True)
class Shape:
    """One row of the table: how a pipeline writes a prompt, and what its edge can tell of it.

    Attributes:
        fill: The prompt with this context.
        join: How the pipeline joins its chunks.
        known: The hints besides context and chunks.
        has_context: The edge knows the rendered context.
        has_chunks: The edge knows the chunks.
        asked: The question that is found without hints, and where.
        fits: How many of the best chunks the drafter's budget holds.
    """

    name: str
    fill: Callable[[str], Prompt]
    join: Callable[[Sequence[str]], str] = joined
    known: dict[str, Any] = field(
        default_factory=lambda: {"question": QUESTION, "question_source": "template"}
    )
    has_context: bool = True
    has_chunks: bool = True
    asked: tuple[str, str] = (QUESTION, "message")
    fits: int = 2

    @property
    def prompt(self) -> Prompt:
        return self.fill(self.join(FACTS))

    @property
    def short(self) -> Prompt:
        return self.fill(self.join(BEST[-self.fits :]))

    @property
    def hints(self) -> PromptHints:
        return PromptHints(
            **self.known,
            context=self.join(FACTS) if self.has_context else None,
            chunks=RANKED if self.has_chunks else (),
            chunk_source="retriever" if self.has_chunks else None,
        )


_STUFF = (
    "Use the following pieces of context to answer the user's question.\nIf you don't know the answer, just "
    "say that you don't know, don't try to make up an answer.\n----------------\n"
)
_REFINE = (
    "We have the opportunity to refine the existing answer (only if needed) with some more context below.\n"
    "------------\n{}\n------------\nGiven the new context, refine the original answer to better answer the "
    "question. If the context isn't useful, return the original answer."
)
_HISTORY = [
    human("Which lighthouse stands on Kullaberg?"),
    assistant("The Kullen lighthouse does."),
]
_FOLLOW_UP = "And who planned it?"
_STANDALONE = {"search_query": QUESTION, "question": _FOLLOW_UP, "question_source": "template"}
_MARKER = (QUESTION, "marker")
_AGENT = {"question": QUESTION, "question_source": "tool_call", "search_query": "Kullen planner"}

SHAPES = [
    Shape(
        "lcel-chain",
        lambda c: [
            human(f"Answer from the context only.\n\nContext:\n{c}\n\nQuestion: {QUESTION}")
        ],
        asked=_MARKER,
    ),
    Shape(
        "create-retrieval-chain",
        lambda c: [system(f"You answer questions about towers. Be brief.\n\n{c}"), human(QUESTION)],
    ),
    Shape(
        "history-aware-retriever",
        lambda c: [system(f"You answer questions.\n\n{c}"), *_HISTORY, human(_FOLLOW_UP)],
        known=_STANDALONE,
        asked=(_FOLLOW_UP, "message"),
    ),
    Shape("retrieval-qa-stuff", lambda c: [system(_STUFF + c), human(QUESTION)]),
    Shape(
        "retrieval-qa-refine",
        lambda c: [human(QUESTION), assistant("Magnus, maybe."), human(_REFINE.format(c))],
    ),
    Shape(
        "create-agent-retriever-tool",
        lambda c: [
            system("You use tools."),
            human(QUESTION),
            tool_call({"query": "Kullen planner"}),
            tool(c),
        ],
        known=_AGENT,
        has_context=False,
        asked=(QUESTION, "tool_call"),
    ),
    Shape(
        "create-agent-custom-tool",
        lambda c: [human(QUESTION), tool_call('{"query": "Kullen planner"}'), tool(c)],
        join=sourced,
        fits=1,
        known=_AGENT,
        has_context=False,
        asked=(QUESTION, "tool_call"),
    ),
    Shape(
        "dynamic-prompt-middleware",
        lambda c: [system(f"You are a helpful assistant. Use this:\n\n{c}"), human(QUESTION)],
        known={},
        has_context=False,
        has_chunks=True,
    ),
    Shape("compact-chat", lambda c: [system(LI_SYSTEM), human(li_text(c))], asked=_MARKER),
    Shape("compact-completion", li_text, asked=_MARKER),
    Shape(
        "refine-completion",
        lambda c: (
            f"The original query is as follows: {QUESTION}\nWe have provided an existing answer: Magnus.\n"
            f"{_REFINE.format(c)}\nRefined Answer: "
        ),
        asked=_MARKER,
    ),
    Shape(
        "refine-chat",
        lambda c: [
            human(
                "You are an expert Q&A system that strictly operates in two modes when refining existing answers:"
                "\n1. **Rewrite** an original answer using the new context.\n2. **Repeat** the original answer if "
                f"the new context isn't useful.\nNew Context: {c}\nQuery: {QUESTION}\nOriginal Answer: Magnus.\n"
                "New Answer: "
            )
        ],
        asked=_MARKER,
    ),
    Shape("tree-summarize", lambda c: [system(LI_SYSTEM), human(li_summary(c))], asked=_MARKER),
    Shape(
        "chat-engine-context",
        lambda c: [
            system(f"Use the context information below to assist the user.\n{RULE}\n{c}\n{RULE}"),
            *_HISTORY,
            human(_FOLLOW_UP),
        ],
        known=_STANDALONE,
        asked=(_FOLLOW_UP, "message"),
    ),
    Shape(
        "function-agent-retriever-tool",
        lambda c: [
            system("You use tools."),
            human(QUESTION),
            tool_call({"input": "kullen"}),
            tool(c + "\n\n"),
        ],
        known={"search_query": "\ninput is Kullen planner\n", "question": QUESTION},
        has_context=False,
        asked=(QUESTION, "tool_call"),
    ),
    Shape(
        "react-agent",
        lambda c: [
            system("You can use tools. Answer with Thought, Action, Action Input."),
            human(QUESTION),
            assistant("Thought: I look it up.\nAction: search\nAction Input: {'input': 'kullen'}"),
            human(f"Observation: {c}"),
        ],
        known={"search_query": "kullen", "question": QUESTION},
        has_context=False,
        asked=(QUESTION, "message"),
    ),
]
