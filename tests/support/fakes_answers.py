"""Answers fed to the parser piece by piece, joined again, and held to the rules of deltas."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rasd_integrations.text import tool_formats as tf
from rasd_integrations.text.answer.parser import AnswerParser, Parsed, ReasoningFormat
from rasd_integrations.text.tool_formats import ToolFormat

FORMATS = [tf.HERMES, tf.LLAMA3, tf.MISTRAL, tf.MISTRAL_ARGS, tf.GRANITE, tf.PHI, tf.FALLBACK]
MARKED = [f for f in FORMATS if f.mark]
NAMES = ("f", "g")
THINK = ReasoningFormat()


@dataclass
class Answer:
    """All that an answer turned out to be."""

    text: str
    reasoning: str
    calls: list[tuple[str, str]]


def joined(pieces: list[Parsed]) -> Answer:
    """Join what the parser returned, and hold deltas to their rules."""
    calls: list[list[str]] = []
    ids = set()
    for delta in (d for piece in pieces for d in piece.tool_calls):
        if delta.index == len(calls):
            assert delta.id
            assert delta.name
            ids.add(delta.id)
            calls.append([delta.name, delta.arguments])
        else:
            assert (len(calls) - 1, None, None) == (delta.index, delta.id, delta.name)
            assert delta.arguments
            calls[-1][1] += delta.arguments
    assert len(ids) == len(calls)
    return Answer(
        "".join(p.text for p in pieces),
        "".join(p.reasoning for p in pieces),
        [(name, arguments) for name, arguments in calls],
    )


def parser(format: ToolFormat | None, **options: Any) -> AnswerParser:
    return AnswerParser(format, NAMES, **{"reasoning": THINK, "thinking": False, **options})


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def answer(format: ToolFormat | None, pieces: str | list[str], **options: Any) -> Answer:
    """Parse an answer that arrives in ``pieces``; a text whole and by the character, which must agree."""
    machine = parser(format, **options)
    done = joined([*(machine.push(piece) for piece in pieces), machine.flush()])
    assert len(done.calls) == machine.num_calls
    if isinstance(pieces, str):
        assert done == answer(format, [pieces], **options)
    return done


def call(format: ToolFormat, name: str, arguments: str) -> str:
    """Return a whole answer of one call."""
    head = format.head.replace("{name}", name)
    return f"{format.opening}{format.begin}{head}{arguments}{format.tail}{format.closing}"
