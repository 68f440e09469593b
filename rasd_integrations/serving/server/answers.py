"""Runs the answers of one HTTP request side by side, each in its place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from rasd_integrations.errors import ServerError
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.serving.server.places import Places
from rasd_integrations.types import TextDelta


class ClientLeftError(ServerError):
    """Nobody reads the answer any more."""


async def deltas_of(
    engine: RASD,
    requests: Sequence[Request],
    places: Places,
    *,
    seconds: float,
    left: Callable[[], Awaitable[object]],
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Yield the deltas of all answers with their numbers, as they come.

    An answer gives its place back when it is made, not when it is read, so a slow reader holds up nobody. Closing the
    iterator ends all of them within a step.

    Args:
        engine: What answers.
        requests: One for each answer.
        places: Where they wait.
        seconds: Longest time until the last delta is made.
        left: Returns when the client has left.

    Raises:
        BusyError: There is no place for them.
        ServerError: The time is over (504), or the client left.
        RASDError: The first error of an answer, which ends the others.
    """
    # Unbounded, but an answer is not: it has at most max_tokens deltas.
    made: asyncio.Queue[tuple[int, TextDelta | Exception | None]] = asyncio.Queue()

    places.reserve(len(requests))

    async def make(number: int, request: Request) -> None:
        try:
            async with places.place(), aclosing(engine.astream(request)) as deltas:
                async for delta in deltas:
                    made.put_nowait((number, delta))
        except Exception as err:  # noqa: BLE001  (raised again in the reader)
            made.put_nowait((number, err))
        else:
            made.put_nowait((number, None))

    async def watch() -> None:
        await left()
        made.put_nowait((-1, ClientLeftError("The client left.")))

    def late() -> None:
        msg = f"The request took longer than the server's limit of {seconds:g} seconds. Ask for fewer tokens."
        made.put_nowait((-1, ServerError(msg, 504)))

    # Each begins before the reader can be told to leave, and so uses its reservation.
    tasks = [asyncio.create_task(make(n, request)) for n, request in enumerate(requests)]
    tasks.append(asyncio.create_task(watch()))
    timer = asyncio.get_running_loop().call_later(seconds, late)
    running = len(requests)
    try:
        while running:
            number, item = await made.get()
            if item is None:
                running -= 1
                if not running:
                    timer.cancel()
            elif isinstance(item, Exception):
                raise item
            else:
                yield number, item
    finally:
        timer.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
