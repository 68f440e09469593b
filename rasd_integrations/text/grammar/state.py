"""The state of one answer in a compiled grammar, and how the answer is closed in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from rasd_integrations.errors import DecodingError
from rasd_integrations.text.grammar.closing import START, CompletionSearch, JsonPosition, advanced
from rasd_integrations.token_mask import Mask, tokens_of

if TYPE_CHECKING:
    from llguidance import LLMatcher


@dataclass(frozen=True, slots=True)
class Closing:
    """How the answers of one grammar are closed in time.

    Attributes:
        search: Finds completions.
        growth: Most tokens that one token can add to the shortest completion.
        opening: Tokens that end a thought, which may have to come first.
        texts: Examples of what patterns and formats allow.
    """

    search: CompletionSearch
    growth: int
    opening: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()


@dataclass(slots=True)
class _Step:
    """What is known behind one token.

    Attributes:
        bound: Upper bound of the shortest completion, in tokens.
        completion: The shortest completion.
        earlier: A completion of here or of the last place where one was known.
        position: The position in the JSON.
        mask: What may follow.
        completions: The completions behind tokens of the mask.
        only: The mask allows nothing but the completion.
        closed: Tokens since ``only`` was first true.
    """

    bound: int
    completion: list[int] | None = None
    earlier: Sequence[int] = ()
    position: JsonPosition = START
    mask: Mask | None = None
    completions: dict[int, list[int]] = field(default_factory=dict)
    only: bool = False
    closed: int = 0


class LLGuidanceState:
    """The state of one answer in a grammar; implements :class:`rasd_integrations.GrammarState`."""

    def __init__(
        self,
        matcher: LLMatcher,
        words: int,
        closing: Closing | None = None,
        room: int = 0,
        completion: Sequence[int] = (),
    ) -> None:
        """Start at ``matcher``, which this state owns; masks have ``words`` words.

        With ``closing``, the answer is closed within ``room`` tokens; ``completion`` is the shortest.
        """
        self._matcher = matcher
        self._words = words
        self._rules = closing
        self._room = room
        self._steps = [_Step(len(completion), [*completion], completion)]

    def mask(self) -> Mask:
        """Return the mask ``[ceil(vocab / 32)]`` of the tokens that may follow.

        Raises:
            DecodingError: The grammar became too large to follow.
        """
        step = self._steps[-1]
        if step.mask is None:
            mask = np.zeros(self._words, dtype=np.int32)
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if self._matcher.is_error():
                msg = f"The answer's grammar cannot be followed any further: {self._matcher.get_error()}"
                raise DecodingError(msg)
            step.mask = self._closable(mask, step)
        return step.mask.copy()

    def forced(self) -> Sequence[int]:
        """Return the tokens that must follow."""
        tokens: list[int] = self._matcher.compute_ff_tokens()
        if not tokens and self.is_closing:
            return self._steps[-1].completion or ()
        return tokens

    def push(self, token_id: int) -> bool:
        """Advance by one token; return False, and do nothing, if it may not follow."""
        step = self._steps[-1]
        if self._is_short(step):
            self.mask()  # sets whether the answer is being closed, also in a block of many tokens
        taken = bool(self._matcher.try_consume_tokens([token_id]) == 1)
        if taken:
            self._steps.append(self._next(step, token_id))
            self._room -= 1
        return taken

    def pop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        if count:
            self._matcher.rollback(count)
            del self._steps[-count:]
            self._room += count

    def fork(self) -> LLGuidanceState:
        """Return an independent copy."""
        fork = LLGuidanceState(self._matcher.deep_copy(), self._words, self._rules, self._room)
        fork._steps = [replace(step, mask=None) for step in self._steps]
        return fork

    @property
    def finished(self) -> bool:
        """True if only the end may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def is_closing(self) -> bool:
        """True once only the shortest completion was allowed."""
        return self._steps[-1].only or self.closed_tokens > 0

    @property
    def closed_tokens(self) -> int:
        """Tokens since then."""
        return self._steps[-1].closed

    def _next(self, step: _Step, token_id: int) -> _Step:
        if self._rules is None:
            return _Step(0)
        position = advanced(step.position, self._rules.search.text([token_id]))
        completion = step.completions.get(token_id)
        if step.completion is not None and step.completion[:1] == [token_id]:
            completion = step.completion[1:]
        bound = step.bound + self._rules.growth if completion is None else len(completion)
        closed = step.closed + 1 if step.only or step.closed else 0
        earlier = step.earlier if completion is None else completion
        return _Step(bound, completion, earlier, position, closed=closed)

    def _is_short(self, step: _Step) -> bool:
        """Return True if the completion behind one more token might not fit."""
        return self._rules is not None and step.bound + self._rules.growth >= self._room

    def _closable(self, mask: Mask, step: _Step) -> Mask:
        """Return the tokens of ``mask`` after which the answer can be closed in time."""
        rules = self._rules
        if rules is None or not self._is_short(step) or self._matcher.is_stopped():
            return mask
        if step.completion is None:
            rest = rules.search.rest_of(self._matcher, step.earlier)
            if rest is not None:
                step.bound, step.earlier = min(step.bound, len(rest)), rest
                if not self._is_short(step):
                    return mask
            found = rules.search.shortest_completion(
                self._matcher, rules.opening, rules.texts, step.position
            )
            if found is None:  # the check before the answer rules this out
                return mask
            step.completion, step.earlier, step.bound = found, found, len(found)
        if not self._is_short(step) or len(tokens_of(mask)) == 1:
            return mask
        mask, step.only, step.completions = rules.search.closable(
            self._matcher, mask, step.completion, self._room, rules.texts, step.position
        )
        return mask
