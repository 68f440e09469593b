"""The package and its pages use the field's words, not those below."""

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
ALLOWED_ON_PAGES = re.compile(rf"^#+ |{ALLOWED_PHRASES.pattern}", re.MULTILINE)  # no comments
# Word: pattern, what to write instead.
WORDS = {
    "law": (r"laws?", "distribution"),
    "opinion": (r"opinions?", "probability, estimate"),
    "foretell": (r"foretells?|foretold|foretelling", "predict"),
    "likest": (r"likest|likelier|likeliest", "most likely, nearest"),
    "of late": (r"of late", "recently"),
    "anew": (r"anew", "again"),
    "had best": (r"had best", "should"),
    "nobody's": (r"nobody's", "reserved, unused"),
    "stand": (r"stands?|stood", "is"),
    "aside": (r"aside", "apart from, skip"),
    "squeezed": (r"squeezed", "closing"),
    "way out": (r"way[ _]out", "shortest completion"),
    "grain": (r"grains?", "row_multiple"),
    "let go": (r"lets? go(?: of)?", "free, release"),
    "whoever": (r"whoever", "callers that"),
    "nonetheless": (r"nonetheless|nevertheless", "still"),
    "Whether": (r"(?<=\"\"\")Whether|(?<=# )Whether", "True if, Return whether"),
    "See that": (r"(?:(?<=\"\"\")|(?<=# ))(?:See|Say|Says) that", "Check, Raise unless, Mark"),
}


@cache
def texts() -> dict[str, str]:
    """Return the files' texts by path, without the phrases that are allowed and the marks of headings."""
    return {
        path.relative_to(ROOT).as_posix(): (
            ALLOWED_PHRASES if path.suffix == ".py" else ALLOWED_ON_PAGES
        ).sub(lambda match: "." * len(match[0]), path.read_text(encoding="utf-8"))
        for path in FILES
    }


@pytest.mark.parametrize("word", WORDS)
def test_a_word_of_our_own_is_not_used(word: str) -> None:
    """The words of the table are found nowhere but in the glossary."""
    pattern, instead = WORDS[word]
    wanted = re.compile(rf"(?<![A-Za-z])(?:{pattern})(?![A-Za-z])", re.IGNORECASE)
    found = [
        f"{path}:{text.count(chr(10), 0, match.start()) + 1}"
        for path, text in texts().items()
        for match in wanted.finditer(text)
    ]
    assert found == [], f"Write {instead} instead of {word!r}"
