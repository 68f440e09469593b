"""The shortest completion of a JSON answer, and the tokens after which it still fits.

A small model may fill a string or list until ``max_tokens``, and half a JSON value is worthless. So a token
is allowed only if the answer can be completed behind it within the remaining tokens. This is a function
of the tokens so far and of ``max_tokens``, part of the grammar's mask: drafting does not change it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from rasd_integrations.token_mask import Mask, flags_of, has_token, mask_of, tokens_of

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

_MAX_STATES = 8_000  # visited in one search
_FEW_STATES = 500  # visited in the search behind one of many tokens
_MAX_TOKENS = 8_192  # of a completion
_MAX_CHECKED = 1024  # tokens of a mask to check; all others are forbidden
_MAX_SEARCHED = 32  # of those, tokens that need a search of their own
_EXITS = 6  # shortest ways through a string, or between two, that are continued
_ALL_CHOICES = 2  # characters of a string or number in which every choice is tried
_MOST_CUT = 32  # first bytes of an earlier completion that may have been written meanwhile
_SPARE = 4  # a four-byte character, or an escape, may have to be finished first
_CLASSES = ("0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_LETTERS = "az AZ09,}-"  # a string that allows each of these is free
_Path: TypeAlias = "tuple[_Path | None, list[int]] | None"


class JsonPosition(NamedTuple):
    """How far a JSON text has come; distinguishes grammar states that have the same mask."""

    in_string: bool = False
    escaped: bool = False
    depth: int = 0
    separators: int = 0
    since: int = 0  # characters since the last bracket, quote or separator


START = JsonPosition()


class CompletionSearch:
    """Finds completions of JSON answers in the tokens of one tokenizer."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: LLTokenizer,
        words: int,
        eos_ids: Sequence[int],
    ) -> None:
        """Read the vocabulary; masks have ``words`` words."""
        self._vocabulary, self._words = vocabulary, words
        ascii_ = sorted(map(chr, range(32, 127)), key=lambda char: not char.isalnum())
        singles = ((char, vocabulary.tokenize_str(char)) for char in ascii_)
        self._ids = {char: tokens[0] for char, tokens in singles if len(tokens) == 1}
        self._chars = np.array([*self._ids.values()], dtype=np.int64)
        self._letters = [self._ids[char] for char in _LETTERS if char in self._ids]
        self._quote = self._ids.get('"', -1)
        vocab = tokenizer.get_vocab().items()
        self._ending = {i: token for token, i in vocab if '"' in token or "\\" in token}
        self._in_string = mask_of((i for _, i in vocab if i not in self._ending), words)
        self._ends = mask_of(eos_ids, words)

    def shortest_completion(
        self,
        matcher: LLMatcher,
        opening: Sequence[int] = (),
        texts: Sequence[str] = (),
        start: JsonPosition = START,
    ) -> list[int] | None:
        """Return the fewest tokens that complete the answer; ``matcher`` is not changed.

        Grammar states are identified by mask and JSON position, so a completion may be longer than the
        shortest if an earlier choice in the schema decides what is needed later.

        Args:
            matcher: The state in the grammar.
            opening: Tokens that may have to come first: the end of a thought.
            texts: Example strings, for strings that may not end yet.
            start: The position in the JSON.

        Returns:
            The tokens, empty if the answer may end here; ``None`` if no completion is found.
        """
        for every in (False, True):
            found = self._search(matcher, opening, texts, start, _MAX_STATES, every=every)
            if found is not None:
                return found
        return None

    def rest_of(self, matcher: LLMatcher, earlier: Sequence[int]) -> list[int] | None:
        """Return the end of an ``earlier`` completion that completes the answer now; maybe not the shortest.

        Within a string all of it does. This takes a fortieth of a search.
        """
        text = self._vocabulary.decode_bytes([*earlier])
        for cut in range(min(len(text), _MOST_CUT)):
            rest = self._vocabulary.tokenize_bytes(text[cut:]) if cut else [*earlier]
            if self._ends_by(matcher, (), rest):
                return rest
        return None

    def closable(
        self,
        matcher: LLMatcher,
        mask: Mask,
        completion: Sequence[int],
        room: int,
        texts: Sequence[str] = (),
        start: JsonPosition = START,
    ) -> tuple[Mask, bool, dict[int, list[int]]]:
        """Return the tokens of ``mask`` after which the answer can be completed in time.

        Args:
            matcher: The state in the grammar; not changed.
            mask: What the grammar allows.
            completion: The shortest completion; empty if the answer may end here.
            room: Tokens that the answer may still have.
            texts: As in :meth:`shortest_completion`.
            start: As in :meth:`shortest_completion`.

        Returns:
            The mask, whether only the completion is left, and the completions behind checked tokens.
        """
        kept = mask_of(completion[:1], self._words) if completion else mask & self._ends
        if room - len(completion) <= _SPARE:
            return kept, True, {}
        free = self._is_free(mask) and self._ends_by(matcher, self._letters[:1], completion)
        kept |= mask & (self._ends | (self._in_string if free else 0))
        known: dict[str | int, list[int] | None] = {}
        searches = 0
        completions: dict[int, list[int]] = {}
        for token in tokens_of(mask & ~kept)[:_MAX_CHECKED]:
            name = self._ending.get(token, "")
            # In a free string only what follows the quote matters.
            kind = name[name.index('"') :] if free and '"' in name and "\\" not in name else token
            if kind not in known:
                known[kind] = self._same_end(matcher, token, completion, room - 1)
                if known[kind] is None and searches < _MAX_SEARCHED:
                    searches += 1
                    known[kind] = self._completion_behind(matcher, token, room - 1, texts, start)
            if (behind := known[kind]) is not None:
                completions[token] = behind
        return kept | mask_of(completions, self._words), False, completions

    def text(self, tokens: list[int]) -> str:
        """Return the text of ``tokens``."""
        text: str = self._vocabulary.decode_str(tokens)
        return text

    def _ends_by(
        self, matcher: LLMatcher, tokens: Sequence[int], completion: Sequence[int]
    ) -> bool:
        """Return True if ``completion`` completes the answer behind ``tokens`` too."""
        probe, run = matcher.deep_copy(), [*tokens, *completion]
        return probe.try_consume_tokens(run) == len(run) and bool(probe.is_accepting())

    def _same_end(
        self, matcher: LLMatcher, token: int, completion: Sequence[int], room: int
    ) -> list[int] | None:
        """Return an end of ``completion``'s text that completes the answer behind ``token`` too, if one is seen.

        This saves most searches: of the tokens that need more than the completion itself, most begin it, or begin an
        escape.
        """
        ends = [[*completion]]
        if token in self._ending:
            text, whole = self.text([token]), self.text([*completion])
            begun = text[text.find('"') :] if '"' in text else ""
            if begun and whole.startswith(begun):
                ends.append(self._vocabulary.tokenize_str(whole[len(begun) :]))
            if (len(text) - len(text.rstrip("\\"))) % 2 and "n" in self._ids:
                ends.append([self._ids["n"], *completion])
        fitting = (end for end in ends if len(end) <= room)
        return next((end for end in fitting if self._ends_by(matcher, [token], end)), None)

    def _completion_behind(
        self, matcher: LLMatcher, token: int, room: int, texts: Sequence[str], start: JsonPosition
    ) -> list[int] | None:
        probe = matcher.deep_copy()
        if probe.try_consume_tokens([token]) != 1:
            return None
        start = advanced(start, self.text([token]))
        found = self._search(probe, (), texts, start, _FEW_STATES, every=False)
        return found if found is not None and len(found) <= room else None

    def _search(  # noqa: C901 - one loop over states
        self,
        matcher: LLMatcher,
        opening: Sequence[int],
        texts: Sequence[str],
        start: JsonPosition,
        max_states: int,
        *,
        every: bool,
    ) -> list[int] | None:
        """Find the completion with the fewest tokens by uniform-cost search."""
        order = count()
        heap: list[tuple[int, int, LLMatcher, _Path, JsonPosition, int]] = []
        seen: set[tuple[int, JsonPosition]] = set()
        mask = np.zeros(self._words, dtype=np.int32)
        # Parts end at a quote or separator; of each only the shortest few ways out are continued.
        previous: list[int] = [-1]
        exits: Counter[int] = Counter()
        max_exits = 16 * _EXITS if every else _EXITS

        def push(
            cost: int,
            state: LLMatcher,
            path: _Path,
            position: JsonPosition,
            part: int,
            tokens: list[int],
        ) -> None:
            taken = state.try_consume_tokens(tokens)
            if taken and cost + taken <= _MAX_TOKENS and not state.is_error():
                then = advanced(position, self.text(tokens[:taken]))
                if then.in_string != position.in_string or then.separators != position.separators:
                    previous.append(part)
                    part = len(previous) - 1
                step = cost + taken, next(order), state, (path, tokens[:taken]), then, part
                heapq.heappush(heap, step)

        start = start._replace(since=0)
        heapq.heappush(heap, (0, next(order), matcher.deep_copy(), None, start, 0))
        if opening:
            push(0, matcher.deep_copy(), None, start, 0, list(opening))
        visited = 0
        while heap and visited < max_states:
            cost, _, state, path, position, part = heapq.heappop(heap)
            if state.is_accepting():
                return self._retokenized(matcher, _unrolled(path))
            if exits[part] >= max_exits:
                continue
            visited += 1
            if previous[part] >= 0:
                exits[previous[part]] += 1
                previous[part] = -1  # counted
            if forced := state.compute_ff_tokens():
                push(cost, state, path, position, part, forced)
                continue
            state.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            key = hash(mask.tobytes()), position
            if state.is_error() or key in seen:
                continue
            seen.add(key)
            if texts and position.since == 0 and not has_token(mask, self._quote):
                for text in texts:
                    tokens = self._vocabulary.tokenize_str(text)
                    push(cost, state.deep_copy(), path, position, part, tokens)
            for token in self._choices(mask, position, every=every):
                push(cost, state.deep_copy(), path, position, part, [token])
        return None

    def _choices(self, mask: Mask, position: JsonPosition, *, every: bool) -> list[int]:
        """Return tokens to try: at first every character, later one of each equivalent class."""
        every = every or position.since < _ALL_CHOICES
        free = self._is_free(mask)
        if free and has_token(mask, self._quote):  # a string that may end is ended
            return [self._quote]
        if free and not every:
            return self._letters[:1]
        allowed = flags_of(mask)[self._chars]
        ids = dict(zip(self._ids, allowed.tolist(), strict=True))
        if not any(ids.values()):
            return tokens_of(mask)[:64]
        for alike in () if every else _CLASSES:
            if all(ids.get(char) for char in alike):
                ids |= dict.fromkeys(alike[2:], 0)
        if any(on for char, on in ids.items() if char != "\\"):
            ids["\\"] = 0  # an escape is never shorter
        return [self._ids[char] for char, on in ids.items() if on]

    def _is_free(self, mask: Mask) -> bool:
        """Return True if any letter may follow."""
        return bool(self._letters) and all(has_token(mask, token) for token in self._letters)

    def _retokenized(self, matcher: LLMatcher, tokens: list[int]) -> list[int]:
        """Return the tokenizer's own tokens of the same text if they are fewer and allowed."""
        if len(tokens) < 2 or any(map(self._vocabulary.is_special_token, tokens)):
            return tokens
        again = self._vocabulary.tokenize_bytes(self._vocabulary.decode_bytes(tokens))
        return again if len(again) < len(tokens) and self._ends_by(matcher, again, ()) else tokens


def advanced(position: JsonPosition, text: str) -> JsonPosition:
    """Return the position after ``text``."""
    in_string, escaped, depth, separators, since = position
    for char in text:
        since += 1
        if escaped or char == "\\":
            escaped = not escaped
        elif char == '"':
            in_string, since = not in_string, 0
        elif not in_string and char in "{[":
            depth, since = depth + 1, 0
        elif not in_string and char in "}]":
            depth, since = depth - 1, 0
        elif not in_string and char in ",:":
            separators, since = separators + 1, 0
    return JsonPosition(in_string, escaped, depth, separators, since)


def _unrolled(path: _Path) -> list[int]:
    parts: list[list[int]] = []
    while path is not None:
        path, tokens = path
        parts.append(tokens)
    return [token for tokens in reversed(parts) for token in tokens]
