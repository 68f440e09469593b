"""Turns on a model: everybody in a round, steps together, faults and interrupts alone. No clock decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from interrupts import Place, Tracer

from rasd_integrations import process
from rasd_integrations.engine import step_queue
from rasd_integrations.engine.step_queue import StepQueue
from rasd_integrations.process import Bell

SOON_S = 10.0  # a thread that takes longer than this hangs


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "the threads stand still"
        time.sleep(0.0005)


class Scripted:
    """A queue whose runs wait for the test and remember what they ran."""

    def __init__(self, max_rows: int = 64, patience: float = 0.0) -> None:
        self.runs: list[list[str]] = []
        self.act: Callable[[Sequence[str]], None] = lambda works: None
        self.queue: StepQueue[str, str] = StepQueue(self.run, max_rows, patience=patience)
        self.threads: list[threading.Thread] = []
        self.results: dict[str, str | BaseException] = {}

    def run(self, works: Sequence[str]) -> list[str]:
        self.runs.append(list(works))
        self.act(works)
        return [work.upper() for work in works]

    @property
    def waiting(self) -> set[str]:
        return {t.work for t in tuple(self.queue._queue)}

    def start(self, work: str, rows: int = 1, *, alone: bool = False) -> None:
        """Submit ``work`` in a thread of its own and return once it stands in the queue or runs."""

        def submit() -> None:
            try:
                self.results[work] = self.queue.submit(work, rows, alone=alone)
            except BaseException as err:  # noqa: BLE001
                self.results[work] = err

        ran = len(self.runs)
        thread = threading.Thread(target=submit, daemon=True)
        self.threads.append(thread)
        thread.start()
        until(lambda: work in self.waiting or len(self.runs) > ran)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(SOON_S)
        assert not any(thread.is_alive() for thread in self.threads)


class Held(Scripted):
    """Its first run stands until :meth:`release`, so that what follows finds a queue."""

    def __init__(self, max_rows: int = 64, patience: float = 0.0) -> None:
        super().__init__(max_rows, patience)
        self.gate = threading.Event()
        self.act = self.hold
        self.start("first")

    def hold(self, works: Sequence[str]) -> None:
        if "first" in works:
            assert self.gate.wait(SOON_S)

    def release(self) -> None:
        self.gate.set()
        self.join()


def test_one_thread_runs_its_own_work():
    """Alone, work runs at once and its result comes back."""
    scripted = Scripted()
    assert ["A", "B"] == [scripted.queue.submit(w, 1) for w in "ab"]
    assert [["a"], ["b"]] == scripted.runs


def test_who_waits_long_takes_no_lead_from_a_thread_at_work(monkeypatch):
    """It looks whether the leader is still there; while that one is, nobody else runs."""
    monkeypatch.setattr(step_queue, "_NOTICED_S", 0.001)
    held = Held()
    held.start("second")
    time.sleep(0.05)
    assert held.runs == [["first"]]
    held.release()
    assert held.runs == [["first"], ["second"]]


def test_waiting_steps_run_together_in_the_order_they_came():
    """What piled up behind a run is one batch, and each thread gets its own result."""
    held = Held()
    for work in "abcd":
        held.start(work)
    held.release()
    assert [["first"], ["a", "b", "c", "d"]] == held.runs
    assert {"first": "FIRST", "a": "A", "b": "B", "c": "C", "d": "D"} == held.results


@pytest.mark.parametrize(
    ("max_rows", "batches"),
    [
        (64, [["a", "b", "c", "d"]]),
        (12, [["a", "b", "d"], ["c"]]),
        (8, [["a", "b"], ["c"], ["d"]]),
        (1, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_batches_stay_within_their_rows(max_rows, batches):
    """A batch holds as many rows as allowed; a step of more runs by itself; 1 turns batching off."""
    held = Held(max_rows)
    for work, rows in zip("abcd", (3, 5, 9, 2), strict=True):
        held.start(work, rows)
    held.release()
    assert [["first"], *batches] == held.runs


def test_pieces_run_alone_and_steps_do_not_wait_for_the_later_ones():
    """A prefill's piece has its turn when it comes; steps behind it join the steps before it."""
    held = Held()
    held.start("step1")
    held.start("piece1", 64, alone=True)
    held.start("step2")
    held.start("piece2", 64, alone=True)
    held.start("step3")
    held.release()
    assert [["first"], ["step1", "step2", "step3"], ["piece1"], ["piece2"]] == held.runs


@pytest.mark.parametrize("max_rows", [1, 4, 64])
def test_between_two_turns_of_a_thread_every_waiting_one_got_its_own(max_rows):
    """Fairness: who waits when a thread is served is served before that thread is again."""
    names, turns = "abcdefg", 12
    pieces = "ceg"  # three answers prefill, four decode in steps of different width
    left = dict.fromkeys(names, turns)
    scripted = Scripted(max_rows)
    log: list[tuple[list[str], set[str]]] = []  # what ran, and who waited meanwhile

    def wait_for_all(works: Sequence[str]) -> None:
        for work in works:
            left[work] -= 1
        expected = {n for n in names if left[n]} - set(works)
        until(lambda: scripted.waiting >= expected)
        log.append((list(works), scripted.waiting))

    def submit(name: str) -> None:
        for _ in range(turns):
            scripted.queue.submit(name, 1 + names.index(name) % 3, alone=name in pieces)

    scripted.act = wait_for_all
    scripted.threads = [threading.Thread(target=submit, args=(n,), daemon=True) for n in names]
    for thread in scripted.threads:
        thread.start()
    scripted.join()
    assert turns * len(names) == sum(len(works) for works, _ in log)
    for at, (works, waited) in enumerate(log):
        for name in works:
            again = next((i for i in range(at + 1, len(log)) if name in log[i][0]), None)
            if again is not None:
                served = {n for ran, _ in log[at + 1 : again + 1] for n in ran}
                assert waited <= served, f"{waited - served} waited while {name} had two turns"


def test_an_error_stays_with_the_work_that_caused_it():
    """A batch that fails runs again one by one, so that the others get their results."""
    held = Held()

    def act(works: Sequence[str]) -> None:
        held.hold(works)
        if "bad" in works:
            msg = f"one of {len(works)}"
            raise ValueError(msg)

    held.act = act
    for work in ("a", "bad", "b"):
        held.start(work)
    held.release()
    assert [["first"], ["a", "bad", "b"], ["a"], ["bad"], ["b"]] == held.runs
    assert ("A", "B", "one of 1") == (
        held.results["a"],
        held.results["b"],
        str(held.results["bad"]),
    )
    assert "X" == held.queue.submit("x", 1)


def test_an_interrupt_of_the_leader_loses_nobody_else():
    """Ctrl-C in the thread that runs a batch ends its own answer; the others' steps run again."""
    held = Held()

    def act(works: Sequence[str]) -> None:
        held.hold(works)
        if "a" in works:
            raise KeyboardInterrupt

    held.act = act
    for work in "abc":
        held.start(work)
    held.release()
    assert isinstance(held.results["a"], KeyboardInterrupt)
    assert ("B", "C") == (held.results["b"], held.results["c"])
    assert [["first"], ["a", "b", "c"], ["b", "c"]] == held.runs
    assert "X" == held.queue.submit("x", 1)


class Interrupted(Bell):
    """A bell whose first waiter is interrupted, by :attr:`now` or as soon as it is woken."""

    def __init__(self, *, when_woken: bool) -> None:
        super().__init__()
        self.now, self.raised, self.when_woken = threading.Event(), False, when_woken

    def wait(self, timeout: float) -> bool:
        if not self.raised:
            assert super().wait(SOON_S) if self.when_woken else self.now.wait(SOON_S)
            self.raised = True
            raise KeyboardInterrupt
        return super().wait(timeout)


@pytest.fixture
def interrupted(monkeypatch) -> Callable[..., Interrupted]:
    """Make the thread that submits ``b`` wait for a bell that is interrupted."""

    def patched(*, when_woken: bool = False) -> Interrupted:
        bell = Interrupted(when_woken=when_woken)
        stock = step_queue._Turn.__init__

        def init(turn, work, rows, *, alone):
            stock(turn, work, rows, alone=alone)
            if work == "b":
                turn.bell = bell

        monkeypatch.setattr(step_queue._Turn, "__init__", init)
        return bell

    return patched


def test_an_interrupted_waiter_leaves_the_queue(interrupted):
    """Work whose thread has left never runs."""
    event, held = interrupted(), Held()
    for work in "abc":
        held.start(work)
    event.now.set()
    until(lambda: "b" in held.results)
    held.release()
    assert isinstance(held.results["b"], KeyboardInterrupt)
    assert [["first"], ["a", "c"]] == held.runs


def test_an_interrupted_waiter_stays_while_its_work_runs(interrupted):
    """The buffer that another thread writes into is not given away before it is done."""
    event, held = interrupted(), Held()
    left_early: list[bool] = []

    def act(works: Sequence[str]) -> None:
        held.hold(works)
        if "b" in works:
            event.now.set()
            until(lambda: event.raised)
            time.sleep(0.02)  # in which it could leave
            left_early.append("b" in held.results)

    held.act = act
    for work in "abc":
        held.start(work)
    held.release()
    assert [False] == left_early
    assert isinstance(held.results["b"], KeyboardInterrupt)
    assert [["first"], ["a", "b", "c"]] == held.runs


def test_an_interrupted_heir_passes_the_lead_on(interrupted):
    """A thread that is interrupted just when it should run the next batch leaves that to another."""
    interrupted(when_woken=True)
    held = Held(max_rows=1)
    for work in "bac":
        held.start(work)
    held.release()
    assert isinstance(held.results["b"], KeyboardInterrupt)
    assert [["first"], ["a"], ["c"]] == held.runs


def test_a_round_waits_for_the_threads_of_the_last_one():
    """An answer that comes back a little later than the others still steps with them."""
    scripted = Scripted(patience=1e9)
    scripted.act = lambda works: (
        until(lambda: "b1" in scripted.waiting) if works == ["a1"] else None
    )

    def first() -> None:
        for work in ("a1", "a2"):
            scripted.queue.submit(work, 1)
        until(lambda: "b2" in scripted.waiting)  # which leads by now, and waits for this thread
        scripted.queue.submit("a3", 1)

    def second() -> None:
        until(lambda: bool(scripted.runs))
        for work in ("b1", "b2"):
            scripted.queue.submit(work, 1)

    scripted.threads = [threading.Thread(target=f, daemon=True) for f in (first, second)]
    for thread in scripted.threads:
        thread.start()
    scripted.join()
    assert [["a1"], ["b1", "a2"], ["b2", "a3"]] == scripted.runs


def test_a_thread_that_stays_away_is_waited_for_once(monkeypatch):
    """A paused consumer costs the others one moment, not one a step."""
    waits: list[float] = []
    stock = Bell.wait
    monkeypatch.setattr(Bell, "wait", lambda bell, t: waits.append(t) or stock(bell, t))
    held = Held(patience=0.5)
    held.start("a")
    held.release()  # and neither thread comes back
    assert ["B", "C", "D"] == [held.queue.submit(w, 1) for w in "bcd"]
    before = len(waits)
    assert ["E", "F"] == [held.queue.submit(w, 1) for w in "ef"]
    assert before == len(waits)


def test_only_other_threads_that_decode_count_as_contention(monkeypatch):
    """Prefills take short pieces for the sake of steps, not of one another, and long ones afterwards."""
    held = Held()
    seen = {"runs": held.queue.is_contended}
    held.release()
    seen["stepped lately"] = held.queue.is_contended
    monkeypatch.setattr(step_queue, "_AWAY_S", 0.0)
    seen["stepped long ago"] = held.queue.is_contended
    held.queue.submit("mine", 1)
    monkeypatch.undo()
    seen["own step"] = held.queue.is_contended
    prefills = Scripted()
    prefills.start("piece", alone=True)
    prefills.join()
    seen["piece"] = prefills.queue.is_contended
    assert {
        "runs": True,
        "stepped lately": True,
        "stepped long ago": False,
        "own step": False,
        "piece": False,
    } == seen


def test_who_leaves_is_neither_waited_for_nor_reckoned_with(monkeypatch):
    """An answer that is done costs the next one nothing, whichever thread that runs in."""
    scripted = Scripted(patience=1e6)
    waits: list[float] = []

    def wait(bell: Bell, timeout: float) -> bool:
        waits.append(timeout)
        raise AssertionError  # else a queue that waits would ask for ever

    monkeypatch.setattr(Bell, "wait", wait)

    def answer() -> None:
        scripted.queue.submit("a", 1)
        scripted.queue.leave()

    thread = threading.Thread(target=answer)
    thread.start()
    thread.join(SOON_S)
    assert not scripted.queue.is_contended
    assert scripted.queue.submit("b", 1) == "B"
    assert waits == []


def places_of(role: str) -> list[Place]:
    """Return every place that a thread passes in the queue: alone, leading others, or led by another."""
    return interrupted_at(role, None)[0].reached


def interrupted_at(role: str, place: Place | None) -> tuple[Tracer, Scripted]:
    """Submit ``b``, interrupted at ``place``, with ``a`` and ``c`` beside it, which another thread may lead."""
    tracer = Tracer(step_queue, process)
    scripted = Scripted()
    held = Held() if role == "led" else None
    scripted = held or scripted

    def act(works: Sequence[str]) -> None:
        if held is not None:
            held.hold(works)
        if role == "leads" and "b" in works and len(works) == 1:
            until(lambda: {"a", "c"} <= scripted.waiting)
        gone = [w for w in works if isinstance(scripted.results.get(w), KeyboardInterrupt)]
        assert not gone, "work runs whose thread has left"

    scripted.act = act

    def submit() -> None:
        def twice() -> str:
            scripted.queue.submit("b", 1)
            return scripted.queue.submit("b", 1)

        try:
            scripted.results["b"] = tracer.run(twice, place)
        except KeyboardInterrupt as err:
            scripted.results["b"] = err.with_traceback(None)
        scripted.queue.leave()

    if held is not None:
        held.start("a")
    mine = threading.Thread(target=submit, daemon=True)
    scripted.threads.append(mine)
    mine.start()
    if role == "leads":
        until(lambda: bool(scripted.runs) or not mine.is_alive())
        scripted.start("a")
        scripted.start("c")
    if held is not None:
        until(lambda: "b" in held.waiting or not mine.is_alive())
        held.start("c")
        held.gate.set()
    scripted.join()
    return tracer, scripted


@pytest.mark.parametrize("role", ["alone", "leads", "led"])
def test_an_interrupt_at_any_line_of_the_queue_stops_nobody_else(role):
    """Fault 18: wherever Ctrl-C comes, the others get their results and the next asks in vain nowhere."""
    lines = set()
    for place in places_of(role):
        tracer, scripted = interrupted_at(role, place)
        others = {"alone": (), "leads": ("a", "c"), "led": ("a", "c", "first")}[role]
        assert {w: w.upper() for w in others} == {w: scripted.results[w] for w in others}
        answers = ThreadPoolExecutor(1).submit(scripted.queue.submit, "next", 1)
        assert answers.result(SOON_S) == "NEXT"
        assert ([], []) == (scripted.queue._queue, scripted.queue._running)
        assert scripted.queue._leader is None
        if tracer.interrupted:
            lines.add(place[:3])
    assert len(lines) > 40


def test_a_leader_whose_thread_has_ended_is_noticed():
    """Fault 18: a lead that nobody gave back is taken over by the next who waits."""
    scripted = Scripted()
    lost = step_queue._Turn[str, str]("lost", 1, alone=False)
    thread = threading.Thread(target=lambda: setattr(lost, "thread", threading.get_ident()))
    thread.start()
    thread.join()
    scripted.queue._leader, scripted.queue._running = lost, [lost]
    scripted.start("a")
    scripted.join()
    assert scripted.results["a"] == "A"
