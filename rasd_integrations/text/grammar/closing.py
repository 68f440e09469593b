"""The shortest way to end a JSON answer, and what may still be begun so that it fits.

Small models may fill an unlimited string or list until ``max_tokens``, and half a JSON value is worth nothing. So a
token is allowed only if the answer can be ended behind it in the tokens that are left. This is part of the grammar's
mask, a function of the tokens so far and of the room: drafting changes nothing in it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_MOST_STATES = 8_000  # looked at in one search for a way out
_MOST_TOKENS = 8_192  # of a way out
_FEW_STATES = 500  # the same, for one of many tokens
_MOST_CHECKED = 1024  # tokens of a mask whose way out is looked for; others may not follow
_MOST_SEARCHED = 32
_EXITS = 6  # shortest ways through a text, or what stands between two, that are gone on from
_TRIED = 2  # characters of a text or number for which each choice is looked at
_SPARE = 4  # a character of four bytes, or an escape, may have to be finished first
_CLASSES = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LETTERS = "az AZ09,}-"  # a text that may go on with each of these is free
_Path: TypeAlias = "tuple[_Path | None, list[int]] | None"
Place: TypeAlias = "tuple[bool, bool, int, int, int]"
"""Whether inside a text and behind a backslash, brackets open, separators passed, characters since: tells states of
one mask apart."""

START: Place = (False, False, 0, 0, 0)


class Closer:
    """Knows how to end the JSON answers of one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: LLTokenizer,
        words: int,
        eos_ids: Sequence[int],
    ) -> None:
        """Read the vocabulary; ``words`` is the length of a mask."""
        self._vocabulary, self._words = vocabulary, words
        ascii_ = sorted(map(chr, range(32, 127)), key=lambda char: not char.isalnum())
        singles = ((char, vocabulary.tokenize_str(char)) for char in ascii_)
        self._ids = {char: tokens[0] for char, tokens in singles if len(tokens) == 1}
        self._chars = np.array([*self._ids.values()], dtype=np.int64)
        self._letters = [self._ids[char] for char in _LETTERS if char in self._ids]
        self._quote = self._ids.get('"', -1)
        known = tokenizer.get_vocab().items()
        self._ending = {n: token for token, n in known if '"' in token or "\\" in token}
        self._in_text = _bits((n for _, n in known if n not in self._ending), words)
        self._ends = _bits(eos_ids, words)

    def shortest_completion(
        self,
        matcher: LLMatcher,
        opening: Sequence[int] = (),
        texts: Sequence[str] = (),
        start: Place = START,
    ) -> list[int] | None:
        """Return the fewest tokens that end the answer from where ``matcher`` stands, which is left alone.

        States are told apart by their masks and by how far the JSON has come, so where a schema has values whose
        choice matters later, a way may be longer than the shortest.

        Args:
            matcher: Its place in the grammar.
            opening: Tokens that may have to come first and are not found letter by letter: the end of a thought.
            texts: Such texts, for strings that may not end yet.
            start: Where in the JSON it stands.

        Returns:
            The tokens, none where the answer may end; ``None`` if no way is found.
        """
        for every in (False, True):
            way = self._search(matcher, opening, texts, start, _MOST_STATES, every=every)
            if way is not None:
                return way
        return None

    def narrowed(
        self,
        matcher: LLMatcher,
        bits: NDArray[np.int32],
        way: Sequence[int],
        room: int,
        texts: Sequence[str] = (),
        start: Place = START,
    ) -> tuple[NDArray[np.int32], bool, dict[int, list[int]]]:
        """Return the mask of tokens behind which the answer can be ended.

        Args:
            matcher: Its place in the grammar, left alone.
            bits: What the grammar allows there.
            way: The way out from there; empty where the answer may end.
            room: Tokens that the answer may still hold.
            texts: As of :meth:`shortest_completion`.
            start: As of :meth:`shortest_completion`.

        Returns:
            The mask, whether the way out alone is left, and the ways out behind tokens that were looked at.
        """
        kept = _bits(way[:1], self._words) if way else bits & self._ends
        if room - len(way) <= _SPARE:
            return kept, True, {}
        free = self._is_free(bits) and self._ends_by(matcher, self._letters[:1], way)
        kept |= bits & (self._ends | (self._in_text if free else 0))
        found: dict[str | int, list[int] | None] = {}
        searches = 0
        ways: dict[int, list[int]] = {}
        for token in _tokens(bits & ~kept)[:_MOST_CHECKED]:
            name = self._ending.get(token, "")
            # In a free text only what follows the letters matters.
            kind = name[name.index('"') :] if free and '"' in name and "\\" not in name else token
            if kind not in found:
                found[kind] = None
                if self._ends_by(matcher, [token], way):
                    found[kind] = [*way]
                elif searches < _MOST_SEARCHED:
                    searches += 1
                    found[kind] = self._way_behind(matcher, token, room - 1, texts, start)
            if (behind := found[kind]) is not None:
                ways[token] = behind
        return kept | _bits(ways, self._words), False, ways

    def _ends_by(self, matcher: LLMatcher, tokens: Sequence[int], way: Sequence[int]) -> bool:
        """Whether ``way`` ends the answer behind ``tokens`` too."""
        probe, run = matcher.deep_copy(), [*tokens, *way]
        return probe.try_consume_tokens(run) == len(run) and bool(probe.is_accepting())

    def _way_behind(
        self, matcher: LLMatcher, token: int, room: int, texts: Sequence[str], start: Place
    ) -> list[int] | None:
        probe = matcher.deep_copy()
        if probe.try_consume_tokens([token]) != 1:
            return None
        way = self._search(
            probe, (), texts, walked(start, self.text([token])), _FEW_STATES, every=False
        )
        return way if way is not None and len(way) <= room else None

    def _search(  # noqa: C901 - one loop over states
        self,
        matcher: LLMatcher,
        opening: Sequence[int],
        texts: Sequence[str],
        start: Place,
        most: int,
        *,
        every: bool,
    ) -> list[int] | None:
        """Look for the way with the fewest tokens, the nearest states first."""
        order = count()
        heap: list[tuple[int, int, LLMatcher, _Path, Place, int]] = []
        seen: set[tuple[int, Place]] = set()
        bits = np.zeros(self._words, dtype=np.int32)
        # Of what may stand between two quotes only the shortest few are gone on from.
        before: list[int] = [-1]
        exits: Counter[int] = Counter()
        most_exits = 16 * _EXITS if every else _EXITS

        def reach(
            cost: int, state: LLMatcher, path: _Path, place: Place, part: int, tokens: list[int]
        ) -> None:
            taken = state.try_consume_tokens(tokens)
            if taken and cost + taken <= _MOST_TOKENS and not state.is_error():
                then = walked(place, self.text(tokens[:taken]))
                if then[0] != place[0] or then[3] != place[3]:
                    before.append(part)
                    part = len(before) - 1
                step = cost + taken, next(order), state, (path, tokens[:taken]), then, part
                heapq.heappush(heap, step)

        start = *start[:-1], 0
        heapq.heappush(heap, (0, next(order), matcher.deep_copy(), None, start, 0))
        if opening:
            reach(0, matcher.deep_copy(), None, start, 0, list(opening))
        looked = 0
        while heap and looked < most:
            cost, _, state, path, place, part = heapq.heappop(heap)
            if state.is_accepting():
                return self._fewest(matcher, _unrolled(path))
            if exits[part] >= most_exits:
                continue
            looked += 1
            if before[part] >= 0:
                exits[before[part]] += 1
                before[part] = -1  # counted
            if forced := state.compute_ff_tokens():
                reach(cost, state, path, place, part, forced)
                continue
            state.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            key = hash(bits.tobytes()), place
            if state.is_error() or key in seen:
                continue
            seen.add(key)
            if texts and place[-1] == 0 and not _holds(bits, self._quote):
                for text in texts:
                    tokens = self._vocabulary.tokenize_str(text)
                    reach(cost, state.deep_copy(), path, place, part, tokens)
            for token in self._choices(bits, place, every=every):
                reach(cost, state.deep_copy(), path, place, part, [token])
        return None

    def _choices(self, bits: NDArray[np.int32], place: Place, *, every: bool) -> list[int]:
        """Return tokens to go on with: every character at first, then one of those that may be alike."""
        every = every or place[-1] < _TRIED
        free = self._is_free(bits)
        if free and _holds(bits, self._quote):  # a text that may end is ended
            return [self._quote]
        if free and not every:
            return self._letters[:1]
        allowed = (bits[self._chars // 32] >> (self._chars % 32)) & 1
        ids = dict(zip(self._ids, allowed.tolist(), strict=True))
        if not any(ids.values()):
            return _tokens(bits)[:64]
        for alike in () if every else _CLASSES:
            if all(ids.get(char) for char in alike):
                ids |= dict.fromkeys(alike[2:], 0)
        if any(on for char, on in ids.items() if char != "\\"):
            ids["\\"] = 0  # an escape is never the shorter way
        return [self._ids[char] for char, on in ids.items() if on]

    def text(self, tokens: list[int]) -> str:
        """Return what ``tokens`` stand for."""
        found: str = self._vocabulary.decode_str(tokens)
        return found

    def _is_free(self, bits: NDArray[np.int32]) -> bool:
        """Whether any letter may follow."""
        return bool(self._letters) and all(_holds(bits, token) for token in self._letters)

    def _fewest(self, matcher: LLMatcher, way: list[int]) -> list[int]:
        """Return the same text in the tokens that the tokenizer makes of it, where they are fewer and may follow."""
        if len(way) < 2:
            return way
        if any(self._vocabulary.is_special_token(token) for token in way):
            return way
        again = self._vocabulary.tokenize_bytes(self._vocabulary.decode_bytes(way))
        return again if len(again) < len(way) and self._ends_by(matcher, again, ()) else way


def walked(place: Place, text: str) -> Place:
    """Return where in the JSON ``text`` leads."""
    inside, escaped, depth, passed, since = place
    for char in text:
        since += 1
        if escaped or char == "\\":
            escaped = not escaped
        elif char == '"':
            inside, since = not inside, 0
        elif not inside and char in "{[":
            depth, since = depth + 1, 0
        elif not inside and char in "}]":
            depth, since = depth - 1, 0
        elif not inside and char in ",:":
            passed, since = passed + 1, 0
    return inside, escaped, depth, passed, since


def _unrolled(path: _Path) -> list[int]:
    parts: list[list[int]] = []
    while path is not None:
        path, tokens = path
        parts.append(tokens)
    return [token for tokens in reversed(parts) for token in tokens]


def _holds(bits: NDArray[np.int32], token: int) -> bool:
    return token >= 0 and bool(int(bits[token // 32]) >> (token % 32) & 1)


def _tokens(bits: NDArray[np.int32]) -> list[int]:
    flags = np.unpackbits(bits.view(np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(flags).tolist()
    return found


def _bits(tokens: Iterable[int], words: int) -> NDArray[np.int32]:
    flags = np.zeros(32 * words, dtype=np.uint8)
    flags[list(tokens)] = 1
    return np.packbits(flags, bitorder="little").view(np.int32)
