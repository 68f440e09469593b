"""Runs the answers of one call concurrently; all stop within a step once their caller leaves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from contextvars import ContextVar, copy_context
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

from rasd_integrations.errors import DecodingError
from rasd_integrations.runtime.aio import Workers

_T = TypeVar("_T")

MOST_AT_ONCE = 32  # answers of one call; the engine takes their steps together

# Each set once a caller around this context has left: a batch may run inside another.
_left: ContextVar[tuple[threading.Event, ...]] = ContextVar("rasd_left", default=())


def as_they_end(
    jobs: Sequence[Callable[[], _T]], limit: int
) -> Generator[tuple[int, _T], None, None]:
    """Yield each job's number and result as it ends: :func:`with_beats` without beats."""
    with closing(with_beats(jobs, limit)) as found:
        for one in found:
            if one is not None:
                yield one


def with_beats(
    jobs: Sequence[Callable[[], _T]], limit: int, beat_s: float | None = None
) -> Generator[tuple[int, _T] | None, None, None]:
    """Run ``jobs`` in at most ``limit`` threads and yield each one's number and result as it ends.

    With ``beat_s`` also ``None``, each time so many seconds passed: a consumer that left is noticed between.

    The first error is raised. It, an interrupt, or a caller that leaves ends the others within a step, through
    :func:`until_left`. A pool of ``concurrent.futures`` would wait for whole answers, also at the end of the process.
    """
    left, workers = threading.Event(), Workers(limit)
    ended: SimpleQueue[tuple[int, _T | None, BaseException | None]] = SimpleQueue()

    def work(number: int, job: Callable[[], _T]) -> None:
        if left.is_set():
            return
        try:
            ended.put((number, job(), None))
        except BaseException as err:  # noqa: BLE001  (raised again in the caller's thread)
            ended.put((number, None, err))

    try:
        for number, job in enumerate(jobs):
            context = copy_context()
            context.run(_left.set, (*_left.get(), left))
            workers.run(partial(context.run, work, number, job))
        for _ in jobs:
            while True:
                try:
                    number, result, error = ended.get(timeout=beat_s)
                    break
                except Empty:
                    yield None
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # its traceback holds this frame
            yield number, cast("_T", result)
    finally:
        left.set()
        while workers.busy:
            try:
                ended.get(timeout=0.02)
            except Empty:
                continue


def has_left() -> bool:
    """Return if a caller of :func:`as_they_end` around this context has left."""
    return any(event.is_set() for event in _left.get())


def is_part() -> bool:
    """Return True in an answer of :func:`as_they_end`."""
    return bool(_left.get())


def check_not_left() -> None:
    """Raise once a caller of :func:`as_they_end` around this context has left.

    Raises:
        DecodingError: One has.
    """
    if has_left():
        msg = "The call that this answer was a part of has ended."
        raise DecodingError(msg)


def until_left(pieces: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Yield ``pieces`` while all callers of :func:`as_they_end` around this context wait.

    Raises:
        DecodingError: A caller has left.
    """
    with closing(pieces):
        for piece in pieces:
            check_not_left()
            yield piece
