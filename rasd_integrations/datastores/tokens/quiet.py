"""Keeps background reading out of the way of answers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Quiet:
    """Counts running answers, which background work waits for."""

    def __init__(self) -> None:
        """Count none."""
        self._lock = threading.Lock()
        self._running = 0

    @contextmanager
    def answer(self) -> Iterator[None]:
        """Count an answer while the block runs."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    @property
    def is_quiet(self) -> bool:
        """True if no answer runs."""
        return not self._running
