"""Keeps background reading out of the way of answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_REST_S = 1.0  # between two pieces of reading while answers run
_LOOK_S = 0.01


class Quiet:
    """Counts running answers; background work waits until there are none, but at most a second."""

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

    def wait(self) -> None:
        """Return when no answer runs, or after a second."""
        until = time.monotonic() + _REST_S
        while self._running and time.monotonic() < until:
            time.sleep(_LOOK_S)
