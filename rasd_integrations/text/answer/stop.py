"""Stop strings in streamed text, and tokens that end an answer."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rasd_integrations.types import TokenBlock

if TYPE_CHECKING:
    from rasd_integrations.text.control import ControlTokens

# Unicode noncharacters: they replace the control tokens within a stop string.
_FIRST_MARK, _NUM_MARKS = 0xFDD0, 32


@dataclass(frozen=True, slots=True)
class Stops:
    """What ends one answer.

    A stop string that is a control token ends the answer wherever it occurs, also within reasoning and
    calls. In one that contains control tokens among text, marks replace them, as the detokenizer drops
    the tokens themselves.

    Attributes:
        texts: Searched for in the answer's text, as given and with marks.
        ends: Token ids that end the answer.
        marks: The mark of each control token, by id; not to be shown.
    """

    texts: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    marks: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, stop: Sequence[str], control: ControlTokens, ends: Collection[int] = ()) -> Stops:
        """Split ``stop`` strings into texts and end tokens; ``ends`` are further end tokens."""
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
    """Yield ``blocks`` up to and including the first token of ``ends``, then close them."""
    try:
        for block in blocks:
            at = next((i for i, token in enumerate(block.token_ids) if token in ends), None)
            if at is not None:
                ids, logprobs = block.token_ids[: at + 1], block.logprobs[: at + 1]
                yield replace(block, token_ids=ids, logprobs=logprobs, finish_reason="stop")
                return
            yield block
    finally:
        blocks.close()


class StopMatcher:
    """Cuts streamed text before the first occurrence of a stop string.

    Text is held back only while it may be the beginning of a stop string.

    Attributes:
        stopped: A stop string was found; the text has ended.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Search for ``stops``."""
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
        # A longer stop string that may begin earlier must be decided first.
        self.stopped = found <= maybe and found < len(self._held)
        safe = self._held[: min(found, maybe)]
        self._held = "" if self.stopped else self._held[len(safe) :]
        return safe

    def flush(self) -> str:
        """Return the held-back text, cut at a stop string; the text has ended."""
        found = self._found()
        self.stopped = self.stopped or found < len(self._held)
        safe, self._held = self._held[:found], ""
        return safe

    def _found(self) -> int:
        """Return the start of the first stop string, else the length of the held text."""
        starts = (self._held.find(stop) for stop in self._stops)
        return min((start for start in starts if start >= 0), default=len(self._held))

    def _may_begin(self) -> int:
        """Return the first position from which the held text begins a stop string."""
        size = len(self._held)
        for start in range(max(0, size - self._longest + 1), size):
            tail = self._held[start:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops):
                return start
        return size
