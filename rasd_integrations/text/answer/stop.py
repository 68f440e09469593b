"""Stop strings over a stream of text."""

from __future__ import annotations

from collections.abc import Sequence


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
