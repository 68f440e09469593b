"""How many answers a server decodes and lets wait; the rest is refused at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from rasd_integrations.errors import ServerError


class BusyError(ServerError):
    """The server has no place for another answer; its ``status`` is 429."""


class Places:
    """A FIFO queue before a number of places; for one event loop.

    Attributes:
        running: Answers that hold a place.
        waiting: Answers in the queue, or on their way to it.
    """

    def __init__(self, places: int, queue: int) -> None:
        """Let ``places`` answers run, and ``queue`` wait."""
        self._places, self._queue = places, queue
        self._line: deque[asyncio.Future[None]] = deque()
        self.running = 0
        self.waiting = 0

    def reserve(self, count: int) -> None:
        """Let ``count`` answers wait; each must then enter a :meth:`place`.

        Raises:
            BusyError: They find neither a place nor room in the queue.
        """
        room = self._places + self._queue - self.running - self.waiting
        if count > room:
            msg = (
                f"{self.running} answers run and {self.waiting} wait; {count} more would be over the limit of "
                f"{self._places} and {self._queue}. Ask again later."
            )
            raise BusyError(msg, 429)
        self.waiting += count

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place, with a reservation, and hold it until the block ends."""
        if self.running < self._places and not self._line:
            self._take()
        else:
            await self._wait()
        try:
            yield
        finally:
            self.running -= 1
            self._call_next()

    def _take(self) -> None:
        self.waiting -= 1
        self.running += 1

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if (
                turn.done() and not turn.cancelled()
            ):  # it was called, and left: the place is free again
                self.running -= 1
                self._call_next()
            else:
                self.waiting -= 1
                with suppress(ValueError):  # it may have been passed over already
                    self._line.remove(turn)
            raise

    def _call_next(self) -> None:
        while self._line and self.running < self._places:
            turn = self._line.popleft()
            if not turn.cancelled():
                self._take()  # on its behalf, so that nobody overtakes it
                turn.set_result(None)
