"""A load runs in a thread of its own; Ctrl-C stops it."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from rasd_integrations.runtime.own_thread import in_own_thread


def test_it_returns_and_raises_what_the_work_does():
    """Results and errors pass through; the thread is gone."""
    assert in_own_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 // 0)
    assert not [t for t in threading.enumerate() if t.name == "rasd-load"]


def test_ctrl_c_reaches_the_work_which_cleans_up():
    """An interrupt of the main thread ends the work within a moment, by its own ``finally``."""
    started, cleaned = threading.Event(), threading.Event()

    def convert() -> None:
        try:
            started.set()
            for _ in range(3000):
                time.sleep(0.01)
        finally:
            cleaned.set()

    def press() -> (
        None
    ):  # as soon as the work begins, so that the main thread may still be starting it
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_own_thread(convert)
    assert cleaned.is_set()
    assert time.monotonic() - begun < 20
    assert not [t for t in threading.enumerate() if t.name == "rasd-load"]
