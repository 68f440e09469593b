"""FIFO queue of a model's steps; waiting decode steps run as one batch.

One of the waiting threads, the leader, runs the work of all and hands out the results (flat combining). A step joins
an earlier one's batch unless another thread has waited since its own thread's last turn. So between two turns of a
thread every waiting thread has one, and a step waits for at most one prefill piece of each other answer.

A thread may be interrupted between any two lines. So shared state changes in locked methods only, a thread leaves the
queue twice (the second call does nothing unless the first was interrupted), and waiting threads check now and then
that the leader is alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from rasd_integrations.process import Bell, check_not_ending, is_alive, locked

_W = TypeVar("_W")
_R = TypeVar("_R")

# How long a batch waits for the threads of the last one, as a share of its time. Without it answers fall into groups
# that miss each other.
_PATIENCE = 0.1
_AWAY_S = 1.0  # a thread that stepped within this time is decoding
_NOTICED_S = 0.05  # how often waiting threads check the leader


class _Turn(Generic[_W, _R]):
    """One thread's request: waiting, running or done."""

    def __init__(self, work: _W, rows: int, *, alone: bool) -> None:
        self.work, self.rows, self.alone = work, rows, alone
        self.thread = threading.get_ident()
        self.arrived = 0  # tick
        self.bell = Bell()
        self.done = self.left = False
        self.result: _R | None = None
        self.error: Exception | None = None

    def finish(self, result: _R | None = None, error: Exception | None = None) -> None:
        self.result, self.error, self.done = result, error, True

    @property
    def is_gone(self) -> bool:
        """True if its thread has ended."""
        return not is_alive(self.thread)


class StepQueue(Generic[_W, _R]):
    """Runs the works of many threads, one call at a time, several works in a call.

    Attributes:
        max_rows: Most rows of a batch; 1 runs each turn alone.
    """

    def __init__(
        self,
        run: Callable[[Sequence[_W]], Sequence[_R]],
        max_rows: int,
        *,
        patience: float = _PATIENCE,
    ) -> None:
        """Serve turns with ``run``.

        Args:
            run: Returns the results of a batch of works, in order. It must not change what a second call with the
                same work reads: the turns of a batch that fails or is interrupted run again.
            max_rows: Most rows of a batch.
            patience: Share of a batch's time that the next one waits for the same threads.
        """
        self.max_rows = max_rows
        self._run = run
        self._patience = patience
        self._lock = threading.Lock()  # of what follows
        self._leader: _Turn[_W, _R] | None = None
        self._queue: list[_Turn[_W, _R]] = []
        self._running: list[_Turn[_W, _R]] = []  # the leader's batch
        self._tick = 0
        self._served: dict[int, int] = {}  # tick of the end of a thread's last turn
        self._stepped: dict[int, float] = {}  # time of the end of a thread's last step
        self._expected: set[int] = set()  # threads of the last batch of steps
        self._began = self._ended = 0.0  # of that batch
        self._taken = 0.0  # when the batch that runs was taken out of the queue

    def submit(self, work: _W, rows: int, *, alone: bool = False) -> _R:
        """Run ``work`` in this thread's turn and return its result.

        After an interrupt ``work`` is not running any more, so its memory may be reused.

        Args:
            work: For ``run``.
            rows: Its size in a batch.
            alone: Never batch it.

        Raises:
            Exception: What ``run`` raised for this work, run by itself.
            SystemExit: The process is ending, and this is not its main thread.
        """
        check_not_ending()
        turn = _Turn[_W, _R](work, rows, alone=alone)
        try:
            try:
                self._take_part(turn)
            finally:
                self._leave(turn)
        finally:  # again: the first call may have been interrupted
            self._leave(turn)
        if turn.error is not None:
            try:
                raise turn.error
            finally:  # the error's frame must not keep the work's memory
                del turn, work
        return turn.result  # type: ignore[return-value]

    @locked
    def leave(self) -> None:
        """Mark this thread as finished, so that batches do not wait for it."""
        self._stepped.pop(threading.get_ident(), None)
        self._expected.discard(threading.get_ident())
        self._ring_if_all_back()

    @property
    def is_contended(self) -> bool:
        """True if another thread is decoding: it waits for a step, runs one, or ran one a moment ago."""
        return bool(self._decoding() - {threading.get_ident()})

    @locked
    def _decoding(self) -> set[int]:
        since = time.perf_counter() - _AWAY_S
        steps = {t.thread for t in (*self._queue, *self._running) if not t.alone}
        return steps | {thread for thread, when in self._stepped.items() if when > since}

    def _take_part(self, turn: _Turn[_W, _R]) -> None:
        """Wait until ``turn`` is done, leading if no other thread does."""
        self._line_up(turn)
        rung = True
        while not turn.done:
            if self._leads(turn, look=not rung):
                self._serve(self._next_batch(turn))
                self._note_served()
            else:
                rung = turn.bell.wait(_NOTICED_S)

    @locked
    def _line_up(self, turn: _Turn[_W, _R]) -> None:
        self._tick += 1
        turn.arrived = self._tick
        self._queue.append(turn)
        self._ring_if_all_back()

    @locked
    def _leads(self, turn: _Turn[_W, _R], *, look: bool) -> bool:
        """Return True if ``turn``'s thread leads; it takes the lead if no other thread has it."""
        leader = self._leader
        if leader is not None and leader is not turn:
            # A thread with a new turn does not lead by its old one.
            if leader.thread != turn.thread and not (look and leader.is_gone):
                return False
            self._pass_on()
        if turn.done:  # by a leader that ended
            return False
        self._leader = turn
        return True

    def _next_batch(self, mine: _Turn[_W, _R]) -> list[_Turn[_W, _R]]:
        """Take the first turn off the queue, and the steps that may run with it."""
        deadline = self._deadline()
        while not self._all_back() and (left := deadline - time.perf_counter()) > 0:
            mine.bell.wait(left)
        return self._take_batch()

    @locked
    def _deadline(self) -> float:
        """Return until when a batch waits for the threads of the last one."""
        alone = self._queue[0].alone
        return 0.0 if alone else self._ended + self._patience * (self._ended - self._began)

    @locked
    def _take_batch(self) -> list[_Turn[_W, _R]]:
        first, *others = self._queue
        batch, rows = [first], first.rows
        rest: list[_Turn[_W, _R]] = []
        for turn in others:
            fits = not (first.alone or turn.alone) and rows + turn.rows <= self.max_rows
            # Do not overtake a turn that has waited since this thread's last one.
            if fits and (not rest or self._served.get(turn.thread, 0) < rest[0].arrived):
                batch.append(turn)
                rows += turn.rows
            else:
                rest.append(turn)
        self._running, self._queue = batch, rest
        self._taken = time.perf_counter()
        return batch

    def _all_back(self) -> bool:
        return self._expected <= {t.thread for t in tuple(self._queue)}

    def _ring_if_all_back(self) -> None:
        if self._leader is not None and self._all_back():
            self._leader.bell.ring()

    def _serve(self, turns: Sequence[_Turn[_W, _R]]) -> None:
        try:
            results = self._run([t.work for t in turns])
        except Exception as err:  # noqa: BLE001  (raised again in the thread whose work it is)
            if len(turns) == 1:
                turns[0].finish(error=err)
                return
            for turn in turns:
                self._serve([turn])
        else:
            for turn, result in zip(turns, results, strict=True):
                turn.finish(result)

    @locked
    def _note_served(self) -> None:
        """Wake the threads of the batch, and record when they had their turn."""
        self._tick += 1
        now = time.perf_counter()
        threads = {t.thread for t in self._running}
        oldest = self._queue[0].arrived if self._queue else self._tick
        self._served = {thread: at for thread, at in self._served.items() if at > oldest}
        self._served |= dict.fromkeys(threads, self._tick)
        if not self._running[0].alone:
            self._stepped = {t: at for t, at in self._stepped.items() if at > now - _AWAY_S}
            self._stepped |= dict.fromkeys(threads, now)
            self._expected, self._began, self._ended = threads, self._taken, now
        for turn in self._running:
            turn.bell.ring()
        self._running = []

    def _leave(self, turn: _Turn[_W, _R]) -> None:
        """Pass the lead on and leave the queue; if another thread is running the work, wait for its end."""
        while not self._has_left(turn):
            try:
                turn.bell.wait(_NOTICED_S)
            except BaseException:  # noqa: BLE001, S112  (a second interrupt; the first is raised once the step is over)
                continue

    @locked
    def _has_left(self, turn: _Turn[_W, _R]) -> bool:
        if turn.left:
            return True
        if self._leader is turn:
            self._pass_on(turn)
        if turn in self._running and not turn.done:
            if self._leader is not None and not self._leader.is_gone:
                return False
            self._pass_on(turn)
        self._queue = [t for t in self._queue if t is not turn]
        turn.left = True
        return True

    def _pass_on(self, leaving: _Turn[_W, _R] | None = None) -> None:
        """Give the lead to the next in line, if any; the lock is held."""
        batch = self._running  # not empty after an interrupt
        line = [t for t in (*batch, *self._queue) if not t.done and t is not leaving]
        # In one line: an interrupt must not lose a turn between queue and batch.
        self._leader, self._queue, self._running = (line[0] if line else None), line, []
        for turn in (*batch, *line[:1]):
            turn.bell.ring()
