"""A blocking iterator as an asynchronous one: its own thread, a queue, and a stop that is heard."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


async def iterate_in_thread(start: Callable[[], Iterator[_T]]) -> AsyncGenerator[_T, None]:
    """Run ``start()`` and the iterator it returns in a thread and yield its items here.

    The event loop is never blocked. When the consumer stops or is cancelled, the thread closes the
    iterator before its next item, which ends decoding within one step.
    """
    loop = asyncio.get_running_loop()
    items: asyncio.Queue[tuple[bool, _T | BaseException | None]] = asyncio.Queue()
    stopped = threading.Event()

    def put(alive: bool, item: _T | BaseException | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(items.put_nowait, (alive, item))

    def work() -> None:
        error: BaseException | None = None
        iterator: Iterator[_T] | None = None
        try:
            iterator = start()
            for item in iterator:
                if stopped.is_set():
                    break
                put(True, item)
        except BaseException as err:  # noqa: BLE001  (raised again in the consumer)
            error = err
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
            put(False, error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), name="rasd-stream", daemon=True).start()
    try:
        while True:
            alive, item = await items.get()
            if not alive:
                if isinstance(item, BaseException):
                    raise item
                return
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
