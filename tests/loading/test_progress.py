"""A slow load shows its progress on standard error; a quick one is silent."""

from __future__ import annotations

import io
import os
import pty
import sys
import threading
import time
import warnings
from contextlib import redirect_stderr

import pytest
from tiny import tiny_llama, tiny_tokenizer
from tqdm import tqdm
from transformers.utils import logging

from rasd_integrations.loading import model as loading
from rasd_integrations.loading import progress
from rasd_integrations.loading.progress import stage, transformers_stage

WHAT = "Converting a.gguf, once"


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=[io.StringIO, Terminal], ids=["pipe", "terminal"])
def err(request):
    """Return a replacement of standard error."""
    return request.param()


def work(err, shown: str | None = WHAT, seconds: float = 0.6) -> None:
    """Take a while over ten items, counted by transformers' bar."""
    with redirect_stderr(err), transformers_stage(shown):
        for _ in logging.tqdm(range(10), desc="their own words"):
            time.sleep(seconds / 10)


def test_what_is_quick_says_nothing(err):
    """Less than two seconds: no line, no bar, and no bar of transformers."""
    work(err, seconds=0.1)
    assert err.getvalue() == ""


def test_what_is_slow_is_said_once(err, monkeypatch):
    """One line in a pipe, a bar with a share on a terminal; never transformers' own words."""
    monkeypatch.setattr(progress, "DELAY_S", 0.05)
    work(err)
    said = err.getvalue()
    if err.isatty():
        assert f"{WHAT}: " in said
        assert "%|" in said
        assert said.endswith("\r")  # the bar is taken away
    else:
        assert said == f"{WHAT} ...\n"
    assert "their own words" not in said


def test_a_second_time_says_nothing_however_long(err, monkeypatch):
    """Nothing to say: transformers' bars are silent all the same."""
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    work(err, None, 0.1)
    assert err.getvalue() == ""


def test_what_cannot_be_counted_shows_its_time(monkeypatch):
    """Without counts the bar shows the elapsed time."""
    monkeypatch.setattr(progress, "DELAY_S", 0.05)
    with redirect_stderr(Terminal()) as err, stage("Compiling"):
        time.sleep(0.5)
    assert "Compiling: 00:00" in err.getvalue()


def test_it_is_turned_off_as_transformers_bars_are(err, monkeypatch):
    """``disable_progress_bar()`` is for ours, too."""
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    monkeypatch.setattr(logging, "_tqdm_active", False)
    work(err, seconds=0.1)
    assert err.getvalue() == ""


def test_an_error_ends_the_bar_and_gives_transformers_its_bars_back(monkeypatch):
    """No thread and no hook remains after an error."""
    monkeypatch.setattr(progress, "DELAY_S", 0.01)
    with pytest.raises(KeyboardInterrupt), transformers_stage(WHAT):
        raise KeyboardInterrupt
    assert logging.set_tqdm_hook(None) is None
    assert not [t for t in threading.enumerate() if t.name == "rasd-progress"]


def test_another_threads_bars_are_left_alone(monkeypatch):
    """The hook is the process's; a bar that another thread opens meanwhile is its own."""
    opened = []
    with transformers_stage(None):
        thread = threading.Thread(target=lambda: opened.append(logging.tqdm([1], disable=True)))
        thread.start()
        thread.join()
        mine = logging.tqdm([1])
    assert isinstance(mine, logging.EmptyTqdm)
    assert isinstance(opened[0], tqdm)


@pytest.mark.parametrize("seconds", [0.0, 0.4])
def test_a_slow_read_of_weights_is_said(seconds, err, monkeypatch, tmp_path):
    """Loading a folder names what it reads, if that takes long."""
    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    real = loading.AutoModelForCausalLM.from_pretrained

    def slow(*args, **kwargs):
        time.sleep(seconds)
        return real(*args, **kwargs)

    monkeypatch.setattr(progress, "DELAY_S", 0.1 if seconds else 60)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", slow)
    with redirect_stderr(err):
        loading.load_model(tmp_path)
    assert (f"Reading {tmp_path}" in err.getvalue()) == bool(seconds)
    assert err.getvalue().count("\n") == (bool(seconds) and not err.isatty())


SCRIPT = """
import sys, time
from rasd_integrations.loading import progress
progress.DELAY_S = 0.1
with progress.transformers_stage("Converting a.gguf, once"):
    for _ in progress.logging.tqdm(range(20)):
        time.sleep(0.05)
print("done")
"""


@pytest.mark.slow
def test_a_real_terminal_shows_a_bar():
    """In a pseudo-terminal the bar is drawn, grows, and leaves an empty line behind."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # fork with threads: it becomes another program at once
        pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", SCRIPT])
    seen = b""
    try:
        while piece := os.read(terminal, 4096):
            seen += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0
    frames = [f for f in seen.decode().split("\r") if "Converting a.gguf, once" in f]
    assert len(frames) > 2, seen
    assert "%|" in frames[-1]
    assert seen.decode().rpartition("\r")[0].endswith("done")
