"""Keeps threads safe from interrupts, forks and the end of the process."""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, Protocol, TypeVar

from typing_extensions import ParamSpec

_P = ParamSpec("_P")
_T = TypeVar("_T")
_HEARD_S = 0.2  # how often a thread that waits for another hears an interrupt


class _HasLock(Protocol):
    @property
    def _lock(self) -> Any: ...


_S = TypeVar("_S", bound=_HasLock)


def locked(method: Callable[Concatenate[_S, _P], _T]) -> Callable[Concatenate[_S, _P], _T]:
    """Run ``method`` with ``self._lock`` held; an interrupt always releases it.

    The lock must be a plain ``Lock`` or ``RLock``. A ``Condition`` or ``Event`` is Python code: an interrupt
    inside it may leave its lock held for ever, or release one that is not held.
    """

    @wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        # On one line, so that no interrupt falls between taking the lock and entering the block.
        with self._lock: return method(self, *args, **kwargs)  # noqa: E701  # fmt: skip

    return call


class Bell:
    """Wakes one waiting thread; if it rang before, the wait ends at once."""

    def __init__(self) -> None:
        """Start silent."""
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        """End the current wait, or the next one; callable from any thread, repeatedly."""
        try:
            self._silent.release()
        except RuntimeError:  # it rang already
            return

    def wait(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds; return True if it rang."""
        return self._silent.acquire(timeout=timeout)


def is_alive(thread: int) -> bool:
    """Return True if this thread exists; after a fork only the forking one does."""
    return thread in sys._current_frames()  # noqa: SLF001  (documented, and the only way for all kinds of threads)


# --- forks ---

_worked: set[int] = set()  # threads that have computed
_lost_team = False


def has_lost_team() -> bool:
    """Return True if this process was forked by a thread that had computed.

    That thread's OpenMP team does not exist here, and a torch step would wait for it for ever.
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
_at_work: dict[int, float] = {}  # seconds that each thread may delay the end of the process
_ending = _registered = False


@contextmanager
def at_work(held_s: float = _HELD_S) -> Iterator[None]:
    """Delay the end of the process, at most ``held_s`` seconds, while this thread is in the block.

    A daemon thread that returns from native code after the interpreter is gone aborts the process. So the end waits
    for threads at work, which check for it before their next step.
    """
    global _registered  # noqa: PLW0603  (registered late, so that it runs before the libraries' handlers)
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
    """Yield from ``items``; this thread is at work while the next one is computed."""
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
    """Raise ``SystemExit`` if the process is ending and this is not the main thread."""
    if _ending and threading.current_thread() is not threading.main_thread():
        raise SystemExit


def _end() -> None:
    """Wait until no other thread, all of them daemons by now, is at work."""
    global _ending  # noqa: PLW0603
    _ending = True
    began = time.monotonic()
    while _held_up_for() > time.monotonic() - began:
        try:
            time.sleep(0.002)
        except KeyboardInterrupt:  # the process is ending anyway
            continue


def _held_up_for() -> float:
    """Return for how many seconds the other threads at work may delay the end."""
    me = threading.get_ident()
    others = ((t, held_s) for t, held_s in tuple(_at_work.items()) if t != me)
    return max((held_s for thread, held_s in others if is_alive(thread)), default=0.0)


def in_own_thread(work: Callable[[], _T]) -> _T:
    """Return what ``work`` returns, or raise what it raises; run it in a thread of its own.

    Python interrupts only the main thread, which waits here and raises ``KeyboardInterrupt`` in the working thread,
    at its next line of Python.
    """
    done: Future[_T] = Future()
    stopped = threading.Event()
    # A bare lock: an interrupt inside a Future's or an Event's own wait can leave their inner lock taken for ever.
    working = threading.Lock()
    working.acquire()

    def run() -> None:
        try:
            if not stopped.is_set():  # interrupted while the thread was starting
                done.set_result(work())
        except BaseException as err:  # noqa: BLE001 -- raised again in the waiting thread
            done.set_exception(err)
        finally:
            working.release()

    thread = threading.Thread(target=run, name="rasd-load")
    try:
        thread.start()
        # Not for ever: a signal that comes just before a lock is waited for does not end the waiting. And not by
        # join(), which takes a thread for ended when it is interrupted.
        while not working.acquire(timeout=_HEARD_S):
            pass
        thread.join()
        return done.result()
    except KeyboardInterrupt:
        stopped.set()
        if thread.is_alive():
            what = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), what)
            thread.join()
        raise
