"""Finds the spans of an answer that are word for word in a chunk.

All runs of five words that answer and chunks share are numbered; a suffix automaton over the chunks' numbers then
gives the longest match at each word of the answer. Linear in the texts' lengths, whatever they repeat.
"""

from __future__ import annotations

import heapq
import re
import time
import unicodedata
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, pairwise

from rasd_integrations.stats import Quote
from rasd_integrations.types import Chunk, TextDelta

MIN_WORDS = 5
"""Least words of a quote."""

# Thai, Lao, Burmese, Khmer, Han and kana are written without spaces: each character is half a word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_UNSPACED_START = re.compile(f"[{_UNSPACED}]")
_ALL_KNOWN = bytes([True] * MIN_WORDS)
_JOINERS = "\u200c\u200d\u00ad"  # inside words: zero-width (non-)joiner, soft hyphen


def find_quotes(answer: str, chunks: Sequence[Chunk]) -> tuple[Quote, ...]:
    """Return the quotes in ``answer``, in its order: the longest first chosen, without overlaps.

    A quote is equal in every character, begins and ends at the ends of words in both texts, and has at least five
    words. A word is a run of letters, digits, underscores and combining marks, with apostrophes and the points of
    numbers in it ("don't", "3.14"). Words without white space between them ("state-of-the-art") count as one, and
    a character of a script without spaces as half a word.

    Args:
        answer: The text.
        chunks: What may be quoted; of several that hold a span the first one counts, and its first place there.
    """
    word = _word_pattern([answer, *(chunk.original for chunk in chunks)])
    words = [match.span() for match in word.finditer(answer)]
    if len(words) < MIN_WORDS or not chunks:
        return ()
    runs = [answer[a:b] for a, b in _run_spans(words)]
    numbers = {run: i for i, run in enumerate(dict.fromkeys(runs))}
    shared = _Shared(numbers)
    is_known = frozenset(answer[a:b] for a, b in words).__contains__
    for chunk in chunks:
        # Most chunks share no five words in a row with the answer, which is told without their positions.
        if _ALL_KNOWN in bytes(map(is_known, word.findall(chunk.original))):
            shared.read(chunk, word)
    ids = [numbers[run] for run in runs]
    quotes = []
    for first, stop in _chosen(answer, words, shared.matches(ids)):
        chunk, at = shared.place(ids[first : stop - MIN_WORDS + 1])
        start, end = words[first][0], words[stop - 1][1]
        quotes.append(Quote(start, end, answer[start:end], chunk.id, at, chunk.metadata))
    return tuple(sorted(quotes, key=lambda quote: quote.start))


def quoted(
    deltas: Generator[TextDelta, None, None], chunks: Sequence[Chunk]
) -> Generator[TextDelta, None, None]:
    """Yield an answer's pieces; the statistics of the last one get its quotes of ``chunks``."""
    texts: list[str] = []
    with closing(deltas):
        for delta in deltas:
            texts.append(delta.text)
            if delta.stats is not None:
                started = time.perf_counter()
                delta.stats.quotes = find_quotes("".join(texts), chunks)
                delta.stats.total_s += time.perf_counter() - started
            yield delta


def _word_pattern(texts: Iterable[str]) -> re.Pattern[str]:
    """Return what matches a word of ``texts``; ``re`` has no class of marks, so theirs are listed."""
    used = {char for text in texts if not text.isascii() for char in set(text)}
    marks = "".join(sorted(c for c in used if unicodedata.category(c)[0] == "M" or c in _JOINERS))
    letter = rf"[^\W{_UNSPACED}]" if used else r"\w"
    run = rf"{letter}+(?:[{marks}]+{letter}*)*" if marks else rf"{letter}+"
    word = rf"{run}(?:['\u2019]{run}|(?<=\d)[.,](?=\d){run})*"
    return re.compile(
        rf"{word}|(?=\w)[{_UNSPACED}]{f'[{marks}]*' if marks else ''}" if used else word
    )


def _run_spans(words: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Return start and end of each run of ``MIN_WORDS`` words."""
    return ((a, b) for (a, _), (_, b) in zip(words, words[MIN_WORDS - 1 :], strict=False))


@dataclass(slots=True)
class _State:
    """Substrings that end at the same places."""

    length: int
    link: int
    first: int
    """Where the first of them ends."""
    next: dict[int, int]


class _Shared:
    """The runs of words that chunks share with an answer, as a suffix automaton over their numbers."""

    def __init__(self, numbers: dict[str, int]) -> None:
        """Know the answer's runs by their numbers."""
        self._numbers = numbers
        self._states = [_State(0, -1, -1, {})]
        self._last = 0
        self._places: list[tuple[Chunk, int]] = []  # chunk and start of each number in the sequence

    def read(self, chunk: Chunk, word: re.Pattern[str]) -> None:
        """Append the runs of ``chunk`` that the answer has, too."""
        text, number = chunk.original, self._numbers.get
        words = [match.span() for match in word.finditer(text)]
        follows = False
        for start, end in _run_spans(words):
            found = number(text[start:end])
            if found is not None:
                if not follows:  # no match crosses a gap
                    self._append(-1 - len(self._places), chunk, start)
                self._append(found, chunk, start)
            follows = found is not None

    def matches(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Return the longest spans of ``ids`` in the sequence, none inside another."""
        states, state, length = self._states, 0, 0
        lengths = []
        for number in ids:
            while state and number not in states[state].next:
                state = states[state].link
                length = states[state].length
            state = states[state].next.get(number, 0)
            length = length + 1 if state else 0
            lengths.append(length)
        ends = enumerate(pairwise([*lengths, 0]), 1)
        return [(end - size, end) for end, (size, then) in ends if size and then != size + 1]

    def place(self, ids: Iterable[int]) -> tuple[Chunk, int]:
        """Return the first place of ``ids`` in the chunks: the chunk and the start in it."""
        state = size = 0
        for size, number in enumerate(ids, 1):  # noqa: B007
            state = self._states[state].next[number]
        return self._places[self._states[state].first - size + 1]

    def _append(self, number: int, chunk: Chunk, start: int) -> None:
        """Extend the automaton (Blumer et al. 1985)."""
        states, at = self._states, len(self._places)
        self._places.append((chunk, start))
        new, state = len(states), self._last
        states.append(_State(at + 1, 0, at, {}))
        while state >= 0 and number not in states[state].next:
            states[state].next[number] = new
            state = states[state].link
        if state >= 0:
            old = states[state].next[number]
            if states[old].length != states[state].length + 1:
                old = self._split(old, state, number)
            states[new].link = old
        self._last = new

    def _split(self, old: int, state: int, number: int) -> int:
        """Split off the suffixes of ``old`` that also end at the new place."""
        states, clone = self._states, len(self._states)
        whole = states[old]
        states.append(_State(states[state].length + 1, whole.link, whole.first, whole.next.copy()))
        whole.link = clone
        while state >= 0 and states[state].next.get(number) == old:
            states[state].next[number] = clone
            state = states[state].link
        return clone


def _half_words(answer: str, words: Iterable[tuple[int, int]]) -> Iterable[int]:
    """Yield what each word counts behind the one before: 2, 1 if written without spaces, 0 if joined to it."""
    spaced, before = False, 0
    for start, end in words:
        joined = spaced and not any(map(str.isspace, answer[before:start]))
        spaced, before = not _UNSPACED_START.match(answer, start), end
        yield (0 if joined else 2) if spaced else 1


def _chosen(
    answer: str, words: Sequence[tuple[int, int]], matches: Iterable[tuple[int, int]]
) -> Iterable[tuple[int, int]]:
    """Yield spans of words, the longest in characters first and then the first, cut where others were chosen."""
    halves = list(_half_words(answer, words))
    size = [0, *accumulate(halves)]
    heap: list[tuple[int, int, int]] = []
    taken: dict[int, tuple[int, int]] = {}  # words of chosen spans

    def push(first: int, stop: int) -> None:
        if stop - first < MIN_WORDS:  # nothing, or too little, is left of it
            return
        before = size[first] if halves[first] else size[first] - 2
        if size[stop] - before >= 2 * MIN_WORDS:
            heapq.heappush(heap, (words[first][0] - words[stop - 1][1], first, stop))

    for first, stop in matches:
        push(first, stop + MIN_WORDS - 1)
    while heap:
        _, first, stop = heapq.heappop(heap)
        # What was chosen is no shorter, so it covers one of the ends.
        a, b = first, stop
        while a < b and a in taken:
            a = taken[a][1]
        while a < b and b - 1 in taken:
            b = taken[b - 1][0]
        if (a, b) != (first, stop):
            push(a, b)
            continue
        taken.update(dict.fromkeys(range(a, b), (a, b)))
        yield a, b
