"""The gate before answers: bytes, order, cancellation, and what is available on a machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import copy_context

import pytest
import torch

from rasd_integrations.errors import DecodingError
from rasd_integrations.runtime import admission
from rasd_integrations.runtime.admission import Admission, memory_available, shared_admission

SOON_S = 10.0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.0005)


class Answers:
    """Answers in threads of their own that stay inside until they are told to end."""

    def __init__(self, gate: Admission) -> None:
        self.gate = gate
        self.inside: list[str] = []
        self.errors: dict[str, BaseException] = {}
        self.ends: dict[str, threading.Event] = {}
        self.threads: list[threading.Thread] = []

    def ask(self, name: str, nbytes: int, cancelled: Callable[[], bool] | None = None) -> None:
        """Ask for room and return once the answer is inside or stands in the line."""
        self.ends[name] = threading.Event()

        def work() -> None:
            try:
                with self.gate.admit(nbytes, cancelled):
                    self.inside.append(name)
                    assert self.ends[name].wait(SOON_S)
            except BaseException as err:  # noqa: BLE001
                self.errors[name] = err

        line = self.gate.waiting
        thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True)
        self.threads.append(thread)
        thread.start()
        until(lambda: name in self.inside or self.gate.waiting > line)

    def end(self, name: str) -> None:
        live = self.gate.live
        self.ends[name].set()
        until(lambda: self.gate.live != live or self.gate.waiting == 0)

    def join(self) -> None:
        for end in self.ends.values():
            end.set()
        for thread in self.threads:
            thread.join(SOON_S)
        assert not any(thread.is_alive() for thread in self.threads)
        assert (0, 0) == (self.gate.live, self.gate.waiting)


def test_answers_wait_until_they_fit_in_the_order_they_came():
    """A small answer does not overtake a large one that waits."""
    answers = Answers(Admission(10))
    for name, nbytes in (("a", 6), ("b", 4), ("c", 7), ("d", 1)):
        answers.ask(name, nbytes)
    assert ["a", "b"] == answers.inside
    answers.ends["b"].set()
    until(lambda: answers.gate.live == 1)
    assert ["a", "b"] == answers.inside  # 7 do not fit beside 6, and d stands behind c
    answers.ends["a"].set()
    until(lambda: len(answers.inside) == 4)
    answers.join()
    assert ["a", "b", "c", "d"] == answers.inside


def test_an_answer_larger_than_the_limit_is_admitted_alone():
    """What can never fit runs when nothing else does."""
    answers = Answers(Admission(10))
    answers.ask("small", 1)
    answers.ask("huge", 99)
    answers.ask("next", 1)
    assert ["small"] == answers.inside
    answers.ends["small"].set()
    until(lambda: "huge" in answers.inside)
    assert 1 == answers.gate.live
    answers.ends["huge"].set()
    until(lambda: "next" in answers.inside)
    answers.join()


def test_a_cancelled_request_leaves_the_line():
    """It ends with an error of its own, and those behind it move up."""
    answers = Answers(Admission(10))
    cancelled = threading.Event()
    answers.ask("a", 6)
    answers.ask("b", 9, cancelled.is_set)
    answers.ask("c", 4)
    cancelled.set()
    until(lambda: "c" in answers.inside)
    assert isinstance(answers.errors["b"], DecodingError)
    answers.join()
    assert ["a", "c"] == answers.inside


def test_an_answer_that_fails_gives_its_room_back():
    """An error inside the block is not swallowed and leaves no bytes behind."""
    gate = Admission(10)
    for _ in range(3):
        with pytest.raises(KeyError), gate.admit(10):
            raise KeyError
    assert 0 == gate.live


def test_an_answer_inside_an_answer_does_not_wait():
    """What an answer asks for itself, in its thread or in its context, is counted but never held up."""
    gate = Admission(10)
    inner = threading.Event()

    def nested() -> None:
        with gate.admit(10):
            inner.set()

    with gate.admit(10):
        with gate.admit(10):
            assert 2 == gate.live
        thread = threading.Thread(target=copy_context().run, args=(nested,), daemon=True)
        thread.start()
        assert inner.wait(SOON_S)
        thread.join(SOON_S)
    answers = Answers(gate)  # and afterwards this context waits again
    answers.ask("a", 10)
    answers.ask("b", 10)
    assert ["a"] == answers.inside
    answers.join()


def test_models_on_one_device_share_its_gate(monkeypatch):
    """The limit is half of what was available, and the same gate comes back."""
    monkeypatch.setattr(admission, "memory_available", lambda device: 1000)
    shared_admission.cache_clear()
    try:
        gate = shared_admission(torch.device("cpu"))
        assert 500 == gate.limit
        assert gate is shared_admission(torch.device("cpu"))
        assert gate is not shared_admission(torch.device("cuda:0"))
    finally:
        shared_admission.cache_clear()


def test_memory_available_is_what_this_machine_has():
    """Some bytes, and not more than are built in."""
    psutil = pytest.importorskip("psutil")
    assert 0 < memory_available(torch.device("cpu")) <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("group", "folder", "files", "rooms"),
    [
        ("0::/app", "app", {"memory.max": "900", "memory.current": "500", "memory.stat": "inactive_file 100\nanon 7"}, [500]),
        ("0::/app", "", {"memory.max": "900", "memory.current": "500", "memory.stat": "anon 7"}, [400]),
        ("0::/app", "app", {"memory.max": "max", "memory.current": "500", "memory.stat": ""}, []),
        ("4:cpu,memory:/app", "memory/app", {"memory.limit_in_bytes": "900", "memory.usage_in_bytes": "500", "memory.stat": "total_inactive_file 300"}, [700]),
        ("1:cpu:/", "", {}, []),
    ],
    ids=["v2", "v2 mounted as root", "v2 without a limit", "v1", "no memory group"],
)  # fmt: skip
def test_a_container_has_what_its_limit_leaves(tmp_path, group, folder, files, rooms):
    """Limits of both kinds of control groups count, less what the kernel would give back."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{group}\n")
    place = tmp_path / "cgroup" / folder
    place.mkdir(parents=True)
    for name, text in files.items():
        (place / name).write_text(text)
    assert rooms == list(admission._cgroup_rooms(tmp_path / "proc", tmp_path / "cgroup"))


def test_a_system_that_says_nothing_is_taken_for_a_small_one(monkeypatch):
    """Without any figure a fixed number of bytes is taken for available."""
    monkeypatch.setattr(admission, "_system_room", lambda: None)
    monkeypatch.setattr(admission, "_cgroup_rooms", lambda: iter(()))
    assert 8 << 30 == memory_available(torch.device("cpu"))
    monkeypatch.setattr(admission, "_cgroup_rooms", lambda: iter((5, 3)))
    assert 3 == memory_available(torch.device("cpu"))
