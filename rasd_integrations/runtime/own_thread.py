"""Runs work in a thread of its own that Ctrl-C reaches."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")
_HEARD_S = 0.2


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
