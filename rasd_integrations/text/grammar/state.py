"""One answer's place in a compiled grammar, and how the answer is closed before its room ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rasd_integrations.errors import DecodingError
from rasd_integrations.text.grammar.closing import START, Closer, Place, walked

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Closing:
    """How an answer is closed in time.

    Attributes:
        closer: Finds the way out.
        growth: Most tokens that one token adds to the way out.
        opening: Tokens that end a thought, which may have to come first.
        texts: That patterns and formats allow.
    """

    closer: Closer
    growth: int
    opening: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(slots=True)
class _Place:
    """What is known behind a token.

    Attributes:
        bound: Most tokens of the way out.
        way: The way out.
        at: Where in the JSON it is.
        mask: What may follow.
        ways: The ways out behind tokens of the mask.
        only: Whether the mask leaves the way out alone.
        closed: Tokens since that was so first.
    """

    bound: int
    way: list[int] | None = None
    at: Place = START
    mask: NDArray[np.int32] | None = None
    ways: dict[int, list[int]] = field(default_factory=dict)
    only: bool = False
    closed: int = 0


class LLGuidanceState:
    """One answer's place in a grammar."""

    def __init__(
        self,
        matcher: LLMatcher,
        words: int,
        closing: Closing | None = None,
        room: int = 0,
        way: Sequence[int] = (),
    ) -> None:
        """Stand where ``matcher`` stands, which is this state's own; masks have ``words`` words.

        With ``closing`` the answer is closed before it has grown by ``room`` tokens; ``way`` is the way out.
        """
        self._matcher = matcher
        self._words = words
        self._closing = closing
        self._room = room
        self._places = [_Place(len(way), [*way])]

    def mask(self) -> NDArray[np.int32]:
        """Return the bits of the tokens that may follow, ``[ceil(vocab / 32)]``.

        Raises:
            DecodingError: The grammar became too large to follow.
        """
        place = self._places[-1]
        if place.mask is None:
            bits = np.zeros(self._words, dtype=np.int32)
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            if self._matcher.is_error():
                msg = f"The answer's grammar cannot be followed any further: {self._matcher.get_error()}"
                raise DecodingError(msg)
            place.mask = self._closed(bits, place)
        return place.mask.copy()

    def forced(self) -> Sequence[int]:
        """Return the tokens that must follow."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        if not tokens and self.is_closing:
            return self._places[-1].way or ()
        return tokens

    def push(self, token_id: int) -> bool:
        """Step over a token; ``False``, and no step, where it may not follow."""
        place = self._places[-1]
        if self._is_short(place):
            self.mask()  # notes whether the answer is being closed, also in a block of many tokens
        taken = bool(self._matcher.try_consume_tokens([token_id]) == 1)
        if taken:
            self._places.append(self._behind(place, token_id))
            self._room -= 1
        return taken

    def _behind(self, place: _Place, token_id: int) -> _Place:
        if self._closing is None:
            return _Place(0)
        at = walked(place.at, self._closing.closer.text([token_id]))
        way = place.ways.get(token_id)
        if place.way is not None and place.way[:1] == [token_id]:
            way = place.way[1:]
        bound = place.bound + self._closing.growth if way is None else len(way)
        closed = place.closed + 1 if place.only or place.closed else 0
        return _Place(bound, way, at, closed=closed)

    def pop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        if count:
            self._matcher.rollback(count)
            del self._places[-count:]
            self._room += count

    def fork(self) -> LLGuidanceState:
        """Return a state of its own at the same place."""
        fork = LLGuidanceState(self._matcher.deep_copy(), self._words, self._closing, self._room)
        fork._places = [
            _Place(p.bound, p.way, p.at, ways=p.ways, only=p.only, closed=p.closed)
            for p in self._places
        ]
        return fork

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def is_closing(self) -> bool:
        """Whether the answer had to be closed because its room ended."""
        return self._places[-1].only or self.closed_tokens > 0

    @property
    def closed_tokens(self) -> int:
        """How many tokens were written since only the way out was left."""
        return self._places[-1].closed

    def _is_short(self, place: _Place) -> bool:
        """Whether the room may be too short for the way out behind one token more."""
        closing = self._closing
        return closing is not None and place.bound + closing.growth >= self._room

    def _closed(self, bits: NDArray[np.int32], place: _Place) -> NDArray[np.int32]:
        """Return what of a mask can be closed in time."""
        closing = self._closing
        if closing is None or not self._is_short(place) or self._matcher.is_stopped():
            return bits
        if place.way is None:
            found = closing.closer.shortest_completion(
                self._matcher, closing.opening, closing.texts, place.at
            )
            if found is None:  # not met in what is checked before an answer begins
                return bits
            place.way, place.bound = found, len(found)
        if not self._is_short(place) or _is_single(bits):
            return bits
        bits, only, place.ways = closing.closer.narrowed(
            self._matcher, bits, place.way, self._room, closing.texts, place.at
        )
        place.only = only
        return bits


def _is_single(bits: NDArray[np.int32]) -> bool:
    words = np.flatnonzero(bits)
    return len(words) == 1 and int(bits[words[0]]).bit_count() == 1
