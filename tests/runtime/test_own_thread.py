"""A load runs in a thread of its own; Ctrl-C stops it."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from rasd_integrations.process import in_own_thread


def test_it_returns_and_raises_what_the_work_does():
    """Results and errors pass through; the thread is gone."""
    assert in_own_thread(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        in_own_thread(lambda: 1 // 0)
    assert not [t for t in threading.enumerate() if t.name == "rasd-load"]


CTRL_C = """
import os, signal, threading, time
from rasd_integrations.process import in_own_thread
signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs ignore Ctrl-C
started = threading.Event()
def convert():
    try:
        started.set()
        for _ in range(3000):
            time.sleep(0.01)
    finally:
        print("cleaned", flush=True)
def press():
    started.wait()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press).start()
try:
    in_own_thread(convert)
except KeyboardInterrupt:
    print("interrupted", [t.name for t in threading.enumerate() if t.name == "rasd-load"])
"""


def test_ctrl_c_reaches_the_work_which_cleans_up():
    """An interrupt of the main thread, in a process of its own, ends the work by its own ``finally``."""
    command = [sys.executable, "-W", "ignore", "-c", CTRL_C]
    run = subprocess.run(command, capture_output=True, text=True, timeout=25, check=True)
    assert run.stdout.split("\n")[:2] == ["cleaned", "interrupted []"]
