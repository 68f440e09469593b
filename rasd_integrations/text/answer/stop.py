"""What ends an answer besides the model's own end: stop strings over a stream of text, and end tokens."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rasd_integrations.types import TokenBlock

if TYPE_CHECKING:
    from rasd_integrations.text.control import ControlTokens

# Characters that Unicode keeps out of texts: what stands for a control token within a stop string.
_FIRST_MARK, _NUM_MARKS = 0xFDD0, 32


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends one answer.

    A stop string that is a control token is an end token: the answer ends there, also within thoughts
    and calls. One that holds control tokens among its text is searched for in a text in which marks
    stand for them, because a detokenizer drops the tokens themselves.

    Attributes:
        texts: Searched for in the answer's text, as they are given and with marks.
        ends: Token ids that end the answer.
        marks: What stands in the text for a control token, by its id; not to be shown.
    """

    texts: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    marks: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, stop: Sequence[str], control: ControlTokens, ends: Collection[int] = ()) -> Stops:
        """Return what ``stop`` means to a model with these control tokens; ``ends`` end its answers besides."""
        texts = list(stop)
        ids = {*ends, *(control.ids[text] for text in stop if text in control.ids)}
        marks: dict[int, str] = {}
        for text in stop:
            marked, done = "", 0
            for start, end in control.found(text):
                token = control.ids.get(text[start:end])
                if text not in control.ids and token is not None and len(marks) < _NUM_MARKS:
                    mark = marks.setdefault(token, chr(_FIRST_MARK + len(marks)))
                    marked, done = f"{marked}{text[done:start]}{mark}", end
            if marked:
                texts.append(marked + text[done:])
        return cls(tuple(texts), frozenset(ids), marks)


def ended_at(
    blocks: Generator[TokenBlock, None, None], ends: Collection[int]
) -> Generator[TokenBlock, None, None]:
    """Yield ``blocks`` up to the first of the tokens ``ends``, which is the last; then close them."""
    try:
        for block in blocks:
            at = next((i for i, token in enumerate(block.token_ids) if token in ends), None)
            if at is not None:
                yield replace(block, token_ids=block.token_ids[: at + 1], finish_reason="stop")
                return
            yield block
    finally:
        blocks.close()


class StopMatcher:
    """Cut a text before the first occurrence of any stop string, however the text arrives in pieces.

    Text is held back only while it may be the beginning of a stop string.

    Attributes:
        stopped: Whether a stop string was found; the text is then at its end.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for ``stops``."""
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return the text that is safe to show."""
        if self.stopped:
            return ""
        self._held += text
        found, maybe = self._found(), self._may_begin()
        # A longer stop string that may begin further left must be decided first.
        self.stopped = found <= maybe and found < len(self._held)
        safe = self._held[: min(found, maybe)]
        self._held = "" if self.stopped else self._held[len(safe) :]
        return safe

    def flush(self) -> str:
        """Return what was held back, cut at a stop string; no more text comes."""
        found = self._found()
        self.stopped = self.stopped or found < len(self._held)
        safe, self._held = self._held[:found], ""
        return safe

    def _found(self) -> int:
        """Return where the first whole stop string starts, else the length of the held text."""
        places = (self._held.find(stop) for stop in self._stops)
        return min((p for p in places if p >= 0), default=len(self._held))

    def _may_begin(self) -> int:
        """Return the first place from which the held text is the beginning of a stop string."""
        size = len(self._held)
        for start in range(max(0, size - self._longest + 1), size):
            tail = self._held[start:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops):
                return start
        return size
