"""The package and its pages use the field's words: those below are counted, and their number may only fall."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    ROOT / "README.md",
    *(ROOT / "rasd_integrations").rglob("*.py"),
    *(p for p in (ROOT / "docs").rglob("*.md") if p.name != "glossary.md"),
]
ALLOWED_PHRASES = re.compile(r"Zipf's law|stands? for\b|stand-ins?\b|stand in for|standalone")
# Word: pattern, what to write instead, how often it is still found.
WORDS = {
    "law": (r"laws?", "distribution", 0),
    "opinion": (r"opinions?", "probability, estimate", 0),
    "foretell": (r"foretells?|foretold|foretelling", "predict", 0),
    "likest": (r"likest|likelier|likeliest", "most likely, nearest", 0),
    "of late": (r"of late", "recently", 0),
    "had best": (r"had best", "should", 0),
    "nobody's": (r"nobody's", "reserved, unused", 0),
    "stand": (r"stands?|stood", "is", 0),
    "aside": (r"aside", "apart from, skip", 0),
    "squeezed": (r"squeezed", "closing", 0),
    "way out": (r"way[ _]out", "shortest completion", 0),
    "grain": (r"grains?", "row_multiple", 0),
    "let go": (r"lets? go(?: of)?", "free, release", 0),
    "whoever": (r"whoever", "callers that", 0),
    "nonetheless": (r"nonetheless|nevertheless", "still", 0),
    "Whether": (r"(?<=\"\"\")Whether|(?<=# )Whether", "True if, Return whether", 0),
    "See that": (r"(?:(?<=\"\"\")|(?<=# ))(?:See|Say|Says) that", "Check, Raise unless, Mark", 0),
}


@cache
def texts() -> dict[str, str]:
    """Return the files' texts by path, without the phrases that are allowed."""
    return {
        path.relative_to(ROOT).as_posix(): ALLOWED_PHRASES.sub(
            lambda match: "." * len(match[0]), path.read_text(encoding="utf-8")
        )
        for path in FILES
    }


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_our_own_is_not_used(word: str) -> None:
    """The words of the table are found no more often than it says; who lowers a count writes it down."""
    pattern, instead, allowed = WORDS[word]
    wanted = re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE)
    found = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}"
        for path, text in texts().items()
        for match in wanted.finditer(text)
    ]
    places = "\n".join(found)
    assert len(found) <= allowed, f"{word!r} {len(found)} times; write {instead}:\n{places}"
