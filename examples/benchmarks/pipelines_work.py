"""Six kinds of work of a pipeline, over documents of the data folder and records that are made here.

A kind is a generator: it yields what is asked and is sent the reply, which later turns may build on.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import chromadb
from langchain_chroma import Chroma

from rasd_integrations.demo.embeddings import MiniLM

PER_DOCUMENT, TURNS = 4, 4
LEAST_DOCUMENTS = 6
COLLECTION = "pipelines"
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long things are, in tokens of the target.

    Attributes:
        chunk: A chunk of the collection.
        k: Chunks in a prompt.
        passage: A passage in a prompt of kinds (c) and (e).
        edited: A passage that is written again.
        answer, turn, bound: Longest answer to a question, in a chat, and under a grammar.
    """

    chunk: int = 160
    k: int = 4
    passage: int = 600
    edited: int = 180
    answer: int = 80
    turn: int = 120
    bound: int = 240


SIZES = {"1k": Sizes(), "7k": Sizes(k=44, passage=6700)}
TINY = Sizes(chunk=40, k=2, passage=60, edited=40, answer=8, turn=8, bound=400)


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt.

    Attributes:
        kind: Letter of the kind of work.
        messages: The conversation so far.
        max_tokens: Longest answer.
        schema: JSON schema of the answer, or of its call where there are tools.
        tools: One of them must be called.
        ids: The prompt in tokens, which every engine decodes from.
    """

    kind: str
    messages: list[Message]
    max_tokens: int
    schema: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """What later turns see of an answer."""

    text: str
    calls: Sequence[tuple[str, str]] = ()


Turns = Generator[Ask, Reply, None]


@dataclass
class Documents:
    """Documents and their questions, cut into the chunks of one collection.

    Attributes:
        rows: A document and its questions each.
        tokenizer: The target's.
        sizes: Lengths.
    """

    rows: list[tuple[str, list[str]]]
    tokenizer: Any
    sizes: Sizes
    ids: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        """Count tokens."""
        self.ids = [
            self.tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in self.rows
        ]

    @classmethod
    def read(cls, folder: Path, chosen: str, count: int, tokenizer: Any, sizes: Sizes) -> Documents:
        """Return the documents that ``SET,OFFSET`` names, enough for ``count`` questions.

        Raises:
            ValueError: The set has too few behind the offset.
        """
        name, _, offset = chosen.partition(",")
        path, start = folder / "leval" / f"{name}.jsonl", int(offset or 0)
        wanted = max(LEAST_DOCUMENTS, -(-count // PER_DOCUMENT))
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[start : start + wanted]]
        if len(rows) < wanted:
            msg = (
                f"{name} has {len(rows)} documents from {start} on, and {count} questions take {wanted}. Choose a "
                f"lower OFFSET or fewer questions."
            )
            raise ValueError(msg)
        return cls([(r["input"], r["instructions"]) for r in rows], tokenizer, sizes)

    def chunks(self) -> list[str]:
        """Return the collection."""
        size = self.sizes.chunk
        return [
            self.tokenizer.decode(ids[i : i + size])
            for ids in self.ids
            for i in range(0, len(ids), size)
        ]

    def passage(self, number: int, size: int) -> str:
        """Return ``size`` tokens: of each document in turn, further on each time; they may run into the next."""
        turn, first = divmod(number, len(self.ids))
        joined = [token for ids in self.ids[first:] + self.ids[:first] for token in ids]
        start = turn * size % max(len(joined) - size, 1)
        return str(self.tokenizer.decode(joined[start : start + size])).strip()

    def questions(self, count: int) -> list[str]:
        """Return questions, some in a row on each document.

        Raises:
            ValueError: There are fewer.
        """
        found = [q for _, questions in self.rows for q in questions[:PER_DOCUMENT]]
        if len(found) < count:
            msg = f"The documents have {len(found)} questions, not {count}. Choose another SET or fewer questions."
            raise ValueError(msg)
        return found[:count]


def build_store(folder: Path, texts: Sequence[str]) -> Chroma:
    """Embed the chunks and keep them in ``folder``, which other processes may open."""
    store = open_store(folder)
    store.add_texts(list(texts), ids=[str(uuid.UUID(int=i)) for i in range(len(texts))])
    return store


def open_store(folder: Path | str) -> Chroma:
    """Return the store of :func:`build_store`."""
    client = chromadb.PersistentClient(str(folder))
    return Chroma(COLLECTION, MiniLM(), client=client)  # type: ignore[arg-type]


def temporary() -> tempfile.TemporaryDirectory[str]:
    """Return a folder; a database may still hold its files when it is removed."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _question(store: Chroma, question: str, k: int, kind: str, sizes: Sizes) -> Ask:
    found = store.similarity_search(question, k=k)
    context = "\n\n".join(document.page_content for document in found)
    text = f"Answer the question from the context.\n\n{context}\n\nQuestion: {question}"
    return Ask(kind, [_user(text)], sizes.answer)


def first_questions(documents: Documents, store: Chroma, count: int) -> Turns:
    """Ask over the collection, each question with its k nearest chunks."""
    for question in documents.questions(count):
        yield _question(store, question, documents.sizes.k, "a", documents.sizes)


REWORDINGS = ("Please tell me: {}", "{} Answer in one or two sentences.")


def reworded(documents: Documents, store: Chroma, count: int) -> Turns:
    """Ask the same in other words, every other one with a chunk less."""
    for number, question in enumerate(documents.questions(count)):
        text = REWORDINGS[number % 2].format(question)
        k = documents.sizes.k - number % 2
        yield _question(store, text, k, "b", documents.sizes)


def _text(limit: int) -> dict[str, Any]:
    return {"type": "string", "maxLength": limit}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties),
        "additionalProperties": False,
    }  # fmt: skip


RECORD = _object(
    title=_text(90),
    subject={"enum": ["computing", "medicine", "law", "business", "society", "other"]},
    summary=_text(240),
    keywords={"type": "array", "items": _text(30), "minItems": 2, "maxItems": 4},
    people={"type": "array", "items": _text(40), "maxItems": 3},
    year={"type": ["integer", "null"]},
    has_figures={"type": "boolean"},
)


def objects(documents: Documents, _store: Chroma, count: int) -> Turns:
    """Read many texts into objects of one schema."""
    head = (
        f"Describe the text by one JSON object with the fields {', '.join(RECORD['properties'])}."
    )
    for number in range(count):
        text = documents.passage(number, documents.sizes.passage)
        yield Ask("c", [_user(f"{head}\n\n{text}")], documents.sizes.bound, schema=RECORD)


def _tool(name: str, description: str, **properties: dict[str, Any]) -> dict[str, Any]:
    function = {"name": name, "description": description, "parameters": _object(**properties)}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("search_orders", "Find the orders of a customer.", customer=_text(40),
          status={"enum": ["open", "sent", "delivered", "returned"]}),
    _tool("get_order", "Read an order.", order_id=_text(12)),
    _tool("book_pickup", "Let a carrier fetch a parcel.", order_id=_text(12), street=_text(40), city=_text(30),
          date=_text(10), reason=_text(80)),
    _tool("send_message", "Write to a customer.", customer=_text(40), subject=_text(60), text=_text(240)),
]  # fmt: skip
CALL = {
    "anyOf": [
        _object(name={"const": f["name"]}, arguments=f["parameters"])
        for f in (tool["function"] for tool in TOOLS)
    ]
}
DESK = (
    "You work at the service desk of a shop. Call one tool at a time: search_orders, then get_order, then "
    "book_pickup, and send_message last."
)
_NAMES = (
    "Ada Lindqvist",
    "Boris Kahn",
    "Chen Wei",
    "Dalia Haddad",
    "Emeka Obi",
    "Fatima Rossi",
    "Goran Novak",
)
_ITEMS = (
    "a brass desk lamp",
    "an oak bookcase",
    "a violin case",
    "two bicycle bells",
    "a set of copper pans",
)
_FAULTS = ("arrived broken", "has the wrong colour", "lacks a part", "came twice", "is too small")
_STREETS = ("Harbour Road", "Mill Lane", "Station Street", "Orchard Way", "North Parade")
_CITIES = ("Oslo", "Cork", "Vienna", "Lima", "Kyoto", "Graz")  # fmt: skip


def agent(documents: Documents, _store: Chroma, count: int) -> Turns:
    """Work through complaints, four calls each; results come from made-up records, whatever was asked for."""
    draw = random.Random(documents.rows[0][0])  # other documents, other records
    for number in range(-(-count // TURNS)):
        order = {
            "order_id": f"R-{draw.randrange(10000, 99999)}", "customer": draw.choice(_NAMES),
            "item": draw.choice(_ITEMS), "street": f"{draw.randrange(1, 90)} {draw.choice(_STREETS)}",
            "city": draw.choice(_CITIES), "delivered": f"2026-0{draw.randrange(1, 9)}-{draw.randrange(10, 28)}",
        }  # fmt: skip
        complaint = (
            f"{order['customer']} writes: my order of {order['item']} {draw.choice(_FAULTS)}. Please fetch it and "
            f"tell me when."
        )
        results = {
            "search_orders": [{key: order[key] for key in ("order_id", "item", "delivered")}],
            "get_order": order,
            "book_pickup": {"booked": True, "order_id": order["order_id"], "between": "9:00 and 12:00"},
            "send_message": {"sent": True, "customer": order["customer"]},
        }  # fmt: skip
        messages = [{"role": "system", "content": DESK}, _user(complaint)]
        for turn in range(min(TURNS, count - number * TURNS)):
            reply = yield Ask("d", [*messages], documents.sizes.bound, CALL, TOOLS)
            for name, arguments in reply.calls:
                call = {"name": name, "arguments": arguments}
                known = f"call{number}{turn}"
                messages += [
                    {"role": "assistant", "content": "",
                     "tool_calls": [{"id": known, "type": "function", "function": call}]},
                    {"role": "tool", "tool_call_id": known, "name": name, "content": json.dumps(results[name])},
                ]  # fmt: skip


CHAT = (
    "Here is a text.\n\n{}\n\nSummarise it in three sentences.",
    "List the main points of your summary, one a line.",
    "Write the summary again and add what the first point of your list means in practice.",
    "Put the summary and the list together in one note for a colleague.",
)


def chat(documents: Documents, _store: Chroma, count: int) -> Turns:
    """Hold conversations of four turns that come back to what was answered."""
    for number in range(-(-count // TURNS)):
        text = documents.passage(number, documents.sizes.passage)
        messages: list[Message] = []
        for turn in CHAT[: count - number * TURNS]:
            messages.append(_user(turn.format(text)))
            reply = yield Ask("e", [*messages], documents.sizes.turn)
            messages.append({"role": "assistant", "content": reply.text or "."})


def edits(documents: Documents, _store: Chroma, count: int) -> Turns:
    """Have passages written again, each with four small changes."""
    for number, turn in islice(((n, t) for n in range(count) for t in range(TURNS)), count):
        text = documents.passage(number, documents.sizes.edited)
        words = sorted(set(re.findall(r"[a-z]{6,}", text)), key=lambda w: (-text.count(w), w))
        one, other = (*words, "the", "the")[:2]
        change = (
            f'but replace every "{one}" by "{one.upper()}"',
            "but leave out the first sentence",
            f'but replace every "{other}" by "{other}s"',
            'and add "Checked by the editor." at the end',
        )[turn]
        message = _user(f"Write the text below again, word for word, {change}.\n\n{text}")
        yield Ask("f", [message], documents.sizes.edited + 60)


Kind = Callable[[Documents, Chroma, int], Turns]
KINDS: dict[str, Kind] = {
    "a": first_questions,
    "b": reworded,
    "c": objects,
    "d": agent,
    "e": chat,
    "f": edits,
}
PIPELINES = ("ab", "c", "d", "e", "f")
"""Kinds that one pipeline does in a row: (b) is nothing without (a)."""
LONG = "abce"
"""Kinds that have a long prompt."""


def conversation(kinds: str, documents: Documents, store: Chroma, count: int) -> Iterator[Turns]:
    """Return the kinds of one pipeline, in order."""
    return (KINDS[kind](documents, store, count) for kind in kinds)
