"""Classifies a call by its prompt and finds the question it asks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rasd_integrations.prompting.hints import PromptHints
from rasd_integrations.prompting.prompt_view import PromptView

CallKind = Literal["plain", "condense", "rag_answer", "refine", "tool_decision", "agent_answer"]

_QUESTION_NAMES = ("query", "question", "input", "query_str", "search_query", "q", "text")
_SHORT = 1024  # characters; a shorter message is a question, a longer one contains one
_TAIL = 0.2  # share of a message that is searched for markers: few-shot examples carry them too
_MIN_TAIL = 2 * _SHORT

# Phrases of the frameworks' default templates; used only if nothing was captured.
_CONDENSE = re.compile(
    r"\b(?:rephrase|reformulate|formulate|rewrite|condense)\b[^.]{0,200}?\bstandalone\b",
    re.IGNORECASE,
)
_REFINE = re.compile(
    r"\brefin(?:e|ing)\s+(?:the\s+|an\s+)?(?:existing|original|previous)\s+answer", re.IGNORECASE
)
_MARKER = re.compile(
    r"^[ \t#*]{0,8}(?:user[ \t]|final[ \t]|original[ \t])?"
    r"(?:question|query|human|user|input)[ \t*]{0,8}[:：][ \t*]{0,8}(?:\n[ \t]{0,8})?(?=\S)",
    re.IGNORECASE | re.MULTILINE,
)
_FOLLOWS = re.compile(r"(?:question|query) is as follows:[ \t]*([^\n]+)", re.IGNORECASE)
_QUESTION_END = re.compile(r"\n\s*\n|\n(?=[ \t]*[A-Z][A-Za-z ]{0,30}:)|\n[ \t]*[-=_#*]{3,}")


@dataclass(frozen=True, slots=True)
class Question:
    """A question as asked, and the query to search with.

    Attributes:
        text: The question to answer; usually part of the prompt.
        query: The retriever's or tool's own query if known, else ``text``.
        source: Where ``text`` was found.
    """

    text: str
    query: str
    source: str

    @property
    def words(self) -> str:
        """Both texts, for ranking by words."""
        return self.text if self.query == self.text else f"{self.text}\n{self.query}"


def classify(view: PromptView, hints: PromptHints) -> CallKind:
    """Return the kind of call, from the prompt's shape and the frameworks' phrases."""
    last = view.last_human()
    turn = range((-1 if last is None else last) + 1, len(view.texts))
    if any(view.is_tool(i) for i in turn):
        return "agent_answer"
    if last is not None and _is_refine(view.texts[last]):
        return "refine"
    if hints.context or hints.chunks:
        return "rag_answer"
    if _is_condense(view):
        return "condense"
    if any(view.is_tool(i) for i in range(len(view.texts))):
        return "tool_decision"
    return "plain"


def find_question(view: PromptView, hints: PromptHints) -> Question | None:
    """Return the question from hints, a tool call, the user's message, a marker or the end."""
    query = _plain(hints.search_query)
    if text := (hints.question or "").strip():
        return Question(text, query or text, hints.question_source or "explicit")
    tool_query = _tool_query(view)
    asked = _asked(view, hints)
    if query:
        return Question(query, query, hints.question_source or "retriever")
    if tool_query:
        return Question(asked[0] if asked else tool_query, tool_query, "tool_call")
    return Question(asked[0], asked[0], asked[1]) if asked else None


def _asked(view: PromptView, hints: PromptHints) -> tuple[str, str] | None:
    """Return the question in the user's own words, and where it was found."""
    humans = [i for i in reversed(range(len(view.texts))) if view.is_human(i)]
    held = [hints.context or "", *(chunk.text for chunk in hints.chunks)]
    for i in humans:
        text = view.texts[i].strip()
        if not text or (_is_refine(text) and i != humans[-1]):
            continue
        if len(text) <= _SHORT and not any(piece and piece in text for piece in held):
            return text, "message"
        first = _FOLLOWS.search(text[:_SHORT]) if _is_refine(text) else None
        if marked := first[1].strip() if first else _marked(text):
            return marked, "marker"
        return _tail(text), "tail"
    texts = [text.strip() for text in view.texts if text.strip()]
    return (_marked(texts[-1]) or _tail(texts[-1]), "tail") if texts else None


def _marked(text: str) -> str | None:
    """Return the text after the last "Question:" near the end of ``text``."""
    start = len(text) - max(int(len(text) * _TAIL), _MIN_TAIL)
    markers = [marker.end() for marker in _MARKER.finditer(text, max(start, 0))]
    if not markers:
        return None
    asked = text[markers[-1] : markers[-1] + _MIN_TAIL]
    end = _QUESTION_END.search(asked)
    return asked[: end.start() if end else None].strip() or None


def _tail(text: str) -> str:
    tail = text[-_SHORT:]
    return tail if len(tail) == len(text) else tail.partition(" ")[2].strip() or tail


def _tool_query(view: PromptView) -> str | None:
    """Return the agent's last search query of this turn, from its tool calls."""
    if isinstance(view.prompt, str):
        return None
    last = view.last_human()
    for message in reversed(view.prompt[0 if last is None else last + 1 :]):
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, Sequence) else ():
            arguments = _arguments(call)
            named = [arguments.get(name) for name in _QUESTION_NAMES]
            for value in (*named, *arguments.values()):
                if isinstance(value, str) and value.strip():
                    return value.strip()
    return None


def _arguments(call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    given = (
        function.get("arguments", function.get("args")) if isinstance(function, Mapping) else None
    )
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return {"input": given}
    return given if isinstance(given, Mapping) else {}


def _plain(query: str | None) -> str:
    # LlamaIndex's RetrieverTool writes its argument as "input is ...".
    return re.sub(r"\A\s*input is\s+", "", query or "").strip()


def _is_refine(text: str) -> bool:
    return bool(_REFINE.search(text[:_SHORT]) or _REFINE.search(text[-_SHORT:]))


def _is_condense(view: PromptView) -> bool:
    ends = [*view.texts[:1], *view.texts[-1:]]
    return any(_CONDENSE.search(t[:_SHORT]) or _CONDENSE.search(t[-_SHORT:]) for t in ends)
