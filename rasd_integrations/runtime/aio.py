"""Runs blocking iterators for event loops, and asynchronous ones for threads."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import TypeVar

from rasd_integrations.process import locked

_T = TypeVar("_T")

MAX_WORKERS = 32  # about as many answers as decode at once; more threads only cost memory
_CHECKED_S = 0.05


class Workers:
    """A FIFO pool of daemon threads that keeps no idle thread.

    Jobs must not wait for one another, or a full pool deadlocks.
    """

    def __init__(self, limit: int) -> None:
        """Run at most ``limit`` jobs at a time."""
        self.limit = limit
        self._lock = threading.Lock()
        self._running: set[object] = set()  # one token a thread
        self._queued: deque[Callable[[], None]] = deque()

    @property
    def busy(self) -> bool:
        """True while a job runs or waits."""
        return bool(self._running)

    def run(self, job: Callable[[], None]) -> None:
        """Run ``job``, which must not raise, as soon as a thread is free."""
        token = self._take(job)
        if token is None:
            return
        try:
            start_thread(lambda: self._work(token))
        except BaseException:  # the system gives no more threads, or an interrupt came
            self._take_back(job, token)
            raise

    @locked
    def _take(self, job: Callable[[], None]) -> object | None:
        """Queue ``job``; return the token of a new thread, if there may be one."""
        self._queued.append(job)
        if len(self._running) >= self.limit:
            return None
        token = object()
        self._running.add(token)
        return token

    @locked
    def _take_back(self, job: Callable[[], None], token: object) -> None:
        self._running.discard(token)
        if job in self._queued:
            self._queued.remove(job)

    @locked
    def _next(self, token: object) -> Callable[[], None] | None:
        if self._queued:
            return self._queued.popleft()
        self._running.discard(token)
        return None

    def _work(self, token: object) -> None:
        while (job := self._next(token)) is not None:
            job()


_workers = Workers(MAX_WORKERS)
# True in a worker. A stream started there (by a drafter or a store that calls a model) gets its own thread: its
# worker may wait for it, and so may all the others.
_in_worker: contextvars.ContextVar[bool] = contextvars.ContextVar("rasd_worker", default=False)


def _after_fork() -> None:
    global _workers  # noqa: PLW0603  (its threads did not come along)
    _workers = Workers(MAX_WORKERS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def start_thread(work: Callable[[], None]) -> None:
    """Run ``work`` in a new daemon thread; the process does not end during its steps."""
    threading.Thread(target=work, name="rasd-stream", daemon=True).start()


async def iterate_in_thread(
    start: Callable[[], Iterator[_T]], stopped: threading.Event | None = None
) -> AsyncGenerator[_T, None]:
    """Run ``start()`` and the iterator it returns in a worker thread and yield its items here.

    If all workers are busy, the call waits for its turn. When the consumer stops or is cancelled, the thread
    closes the iterator before its next item, which ends decoding within one step.

    Args:
        start: Makes the iterator; both run in the caller's context variables.
        stopped: Set when the consumer has left, for an iterator that waits before its first item.
    """
    loop = asyncio.get_running_loop()
    # Unbounded: a worker must never wait for its consumer, which may wait for a worker.
    items: asyncio.Queue[tuple[bool, _T | BaseException | None]] = asyncio.Queue()
    left = threading.Event() if stopped is None else stopped

    def put(alive: bool, item: _T | BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(items.put_nowait, (alive, item))
        except RuntimeError:  # the loop was closed
            left.set()

    def work() -> None:
        error: BaseException | None = None
        try:
            if not left.is_set():
                iterator = start()
                try:
                    for item in iterator:
                        put(True, item)
                        if left.is_set():
                            break
                finally:
                    getattr(iterator, "close", lambda: None)()
        except BaseException as err:  # noqa: BLE001  (raised again in the consumer)
            error = err
        put(False, error)
        del error  # its traceback holds this frame, and so all that the answer held

    nested = _in_worker.get()
    context = contextvars.copy_context()
    context.run(_in_worker.set, True)
    try:
        (start_thread if nested else _workers.run)(lambda: context.run(work))
        while True:
            alive, item = await items.get()
            if alive:
                yield item  # type: ignore[misc]
            elif isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item
            else:
                return
    finally:
        left.set()


def iterate_in_own_loop(
    pieces: AsyncGenerator[_T, None], check: Callable[[], object]
) -> Generator[_T, None, None]:
    """Yield ``pieces`` in an event loop of this thread; what ``check`` raises, soon after it does, ends them.

    A thread that waits for a socket hears nothing else; a loop does.
    """
    loop = asyncio.new_event_loop()
    try:
        while True:
            task = loop.create_task(_next_of(pieces))
            try:
                while not task.done():
                    loop.run_until_complete(asyncio.wait([task], timeout=_CHECKED_S))
                    check()
            finally:
                if task.cancel():  # it was not done
                    loop.run_until_complete(asyncio.wait([task]))
            found = task.result()
            if not found:
                return
            yield found[0]
    finally:
        loop.run_until_complete(pieces.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _next_of(pieces: AsyncGenerator[_T, None]) -> tuple[_T, ...]:
    """Return the next piece alone; nothing at the end."""
    async for piece in pieces:
        return (piece,)
    return ()
