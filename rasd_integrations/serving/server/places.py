"""How many answers a server decodes and lets wait; the rest is refused at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rasd_integrations.errors import ServerError


class BusyError(ServerError):
    """The server has no place for another answer; its ``status`` is 429."""


class Places:
    """A FIFO queue before a number of places; for one event loop.

    Attributes:
        running: Answers that hold a place.
        waiting: Answers in the queue.
    """

    def __init__(self, places: int, queue: int) -> None:
        """Let ``places`` answers run, and ``queue`` wait."""
        self._places, self._queue = places, queue
        self._line: deque[asyncio.Future[None]] = deque()
        self.running = 0
        self.waiting = 0

    def check_room(self, count: int) -> None:
        """Raise :class:`BusyError` if ``count`` more answers find neither a place nor room in the queue."""
        room = self._places + self._queue - self.running - self.waiting
        if count > room:
            msg = (
                f"{self.running} answers run and {self.waiting} wait; {count} more would be over the limit of "
                f"{self._places} and {self._queue}. Ask again later."
            )
            raise BusyError(msg, 429)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and hold it until the block ends."""
        if self.running < self._places and not self._line:
            self.running += 1
        else:
            await self._wait()
        try:
            yield
        finally:
            self.running -= 1
            self._call_next()

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        self.waiting += 1
        try:
            await turn
        except asyncio.CancelledError:
            if (
                turn.done() and not turn.cancelled()
            ):  # it was called, and left: the place is free again
                self.running -= 1
                self._call_next()
            raise
        finally:
            self.waiting -= 1
            if turn in self._line:
                self._line.remove(turn)

    def _call_next(self) -> None:
        while self._line and self.running < self._places:
            turn = self._line.popleft()
            if not turn.done():
                self.running += 1  # on its behalf, so that nobody overtakes it
                turn.set_result(None)
