"""What the process does to threads: interrupts between any two lines, its forks and its end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, Protocol, TypeVar

from typing_extensions import ParamSpec

_P = ParamSpec("_P")
_T = TypeVar("_T")


class _HasLock(Protocol):
    @property
    def _lock(self) -> Any: ...


_S = TypeVar("_S", bound=_HasLock)


def locked(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Run ``method`` with ``self._lock`` held, which an interrupt never leaves behind.

    The lock must be a plain ``Lock`` or ``RLock``. A ``Condition`` or an ``Event`` is Python code: an interrupt
    inside of it leaves its lock taken for ever, or releases one that is not held.
    """

    @wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        # On one line, so that not even a tracer finds a place where the lock is held but not yet watched.
        with self._lock: return method(self, *args, **kwargs)  # noqa: E701  # fmt: skip

    return call


class Bell:
    """Wakes one thread that waits for it; rung before, the wait is over at once."""

    def __init__(self) -> None:
        """Nobody has rung yet."""
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        """End the wait of now, or the next one; any thread may, and more than once."""
        try:
            self._silent.release()
        except RuntimeError:  # it has been rung already
            return

    def wait(self, timeout: float) -> bool:
        """Wait for at most ``timeout`` seconds; return whether it was rung."""
        return self._silent.acquire(timeout=timeout)


def is_alive(thread: int) -> bool:
    """Whether the thread with this identifier exists; after a fork only the one that forked does."""
    return thread in sys._current_frames()  # noqa: SLF001  (documented, and the only way for threads of any make)


# --- forks ---

_worked: set[int] = set()  # threads that have been at work
_lost_team = False


def has_lost_team() -> bool:
    """Whether this process was forked by a thread that had been at work.

    Torch's helper threads of that thread (OpenMP's team) are not there, and a step would wait for them for ever.
    """
    return _lost_team


def _after_fork() -> None:
    global _lost_team  # noqa: PLW0603
    _lost_team |= threading.get_ident() in _worked
    _worked.clear()
    _at_work.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


# --- the end of the process ---

_HELD_S = 30.0
_at_work: dict[int, float] = {}  # by thread: for how long it may hold up the end of the process
_ending = _registered = False


@contextmanager
def at_work(held_s: float = _HELD_S) -> Iterator[None]:
    """Let the end of the process wait, for at most ``held_s``, while this thread is in the block.

    A daemon thread that wants to come back to Python out of native code, but finds the interpreter gone, takes the
    process down with it (``abort``). So the end waits for the threads at work, which hear of it before their next step.
    """
    global _registered  # noqa: PLW0603  (as late as this, so that it runs before what libraries have registered)
    if not _registered:
        _registered = True
        atexit.register(_end)
    me = threading.get_ident()
    _worked.add(me)
    before = _at_work.get(me)
    _at_work[me] = held_s
    try:
        yield
    finally:
        if before is None:
            _at_work.pop(me, None)
        else:
            _at_work[me] = before


def each_at_work(items: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Yield from ``items``, at work while the next one is made."""
    try:
        while True:
            with at_work():
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        with at_work():
            items.close()


def check_not_ending() -> None:
    """End this thread where the process ends; the main one goes on.

    Raises:
        SystemExit: It ends.
    """
    if _ending and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def _end() -> None:
    """Wait until no other thread is at work. Only daemon threads are left by now."""
    global _ending  # noqa: PLW0603
    _ending = True
    began = time.monotonic()
    while _held_up_for() > time.monotonic() - began:
        try:
            time.sleep(0.002)
        except KeyboardInterrupt:  # it ends already
            continue


def _held_up_for() -> float:
    """Return for how many seconds the other threads at work may hold up the end."""
    me = threading.get_ident()
    others = ((t, held_s) for t, held_s in tuple(_at_work.items()) if t != me)
    return max((held_s for thread, held_s in others if is_alive(thread)), default=0.0)
