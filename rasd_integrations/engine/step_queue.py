"""Whose turn it is on a model: first come, first served, but decoding steps that wait run together.

Threads hand in what they want to run; one of them, the leader, runs it and hands the others their results
(flat combining). A step is taken along with an earlier one unless somebody has waited since its own
thread's last turn. So between two turns of a thread everybody who waited had one, and a step waits for at
most one piece of a prefill of each other answer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_W = TypeVar("_W")
_R = TypeVar("_R")

# How long a batch stays open for the threads of the last one, as a share of that one's time: the most that
# a latecomer costs the others. Without it answers part into groups that miss each other.
_PATIENCE = 0.1
_AWAY_S = (
    1.0  # a thread that stepped within this time decodes: it drafts now, or its consumer is at work
)


class _Turn(Generic[_W, _R]):
    """One thread's wish to run: waiting, running or done."""

    def __init__(self, work: _W, rows: int, *, alone: bool) -> None:
        self.work, self.rows, self.alone = work, rows, alone
        self.thread = threading.get_ident()
        self.arrived = 0  # tick
        self.woken = threading.Event()
        self.leads = self.done = False
        self.result: _R | None = None
        self.error: Exception | None = None

    def finish(self, result: _R | None = None, error: Exception | None = None) -> None:
        self.result, self.error, self.done = result, error, True
        self.woken.set()


class StepQueue(Generic[_W, _R]):
    """Turns on something that runs one call at a time, but several pieces of work in a call.

    Attributes:
        max_rows: Most rows that run together; 1 runs each turn alone.
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
            run: Takes the works of a batch and returns their results in order. It must not change what a
                second call with the same work reads: where a batch fails, or the thread that runs it is
                interrupted, its turns run again.
            max_rows: Most rows that run together.
            patience: Share of a batch's time that the next one stays open for the same threads.
        """
        self.max_rows = max_rows
        self._run = run
        self._patience = patience
        self._state = threading.Condition()  # guards what follows; told when the expected are back
        self._led = False
        self._queue: list[_Turn[_W, _R]] = []
        self._running: list[_Turn[_W, _R]] = []
        self._tick = 0
        self._served: dict[
            int, int
        ] = {}  # tick of the end of a thread's last turn, while it matters
        self._stepped: dict[int, float] = {}  # its time, where it was a step, for a while
        self._expected: set[int] = set()  # threads of the last batch of steps
        self._began = self._ended = 0.0  # of that batch

    def submit(self, work: _W, rows: int, *, alone: bool = False) -> _R:
        """Run ``work`` in this thread's turn and return its result.

        Args:
            work: For ``run``.
            rows: What it adds to a batch.
            alone: It is never part of a batch.

        Raises:
            Exception: What ``run`` raised for this work, run by itself.
        """
        turn = _Turn[_W, _R](work, rows, alone=alone)
        try:
            with self._state:
                self._tick += 1
                turn.arrived = self._tick
                self._queue.append(turn)
                turn.leads, self._led = not self._led, True
                if self._all_back():
                    self._state.notify()
            if not turn.leads:
                turn.woken.wait()
            if not turn.done:
                self._lead(turn)
        except BaseException:
            self._withdraw(turn)
            raise
        if turn.error is not None:
            try:
                raise turn.error
            finally:  # the error's own frame must not keep the work's memory
                del turn, work
        return turn.result  # type: ignore[return-value]

    def leave(self) -> None:
        """Say that this thread steps no more, so that nobody waits for it or takes it for one that decodes."""
        with self._state:
            self._stepped.pop(threading.get_ident(), None)
            self._expected.discard(threading.get_ident())
            if self._all_back():
                self._state.notify()

    @property
    def is_contended(self) -> bool:
        """Whether another thread decodes: it waits for a step, has one, or had one a moment ago."""
        me, since = threading.get_ident(), time.perf_counter() - _AWAY_S
        with self._state:
            steps = {t.thread for t in (*self._queue, *self._running) if not t.alone}
            steps |= {thread for thread, when in self._stepped.items() if when > since}
        return bool(steps - {me})

    def _lead(self, mine: _Turn[_W, _R]) -> None:
        """Serve turns until ``mine`` is done, then pass the lead on."""
        while not mine.done:
            with self._state:
                self._running = self._next_batch()
                began = time.perf_counter()
            self._serve(self._running)
            with self._state:
                self._note_served(began)
        with self._state:
            self._pass_on(mine)

    def _next_batch(self) -> list[_Turn[_W, _R]]:
        """Take the first turn out of the queue, and the steps that may run with it."""
        if not self._queue[0].alone:
            deadline = self._ended + self._patience * (self._ended - self._began)
            while not self._all_back() and (left := deadline - time.perf_counter()) > 0:
                self._state.wait(left)
        first, *others = self._queue
        batch, rows = [first], first.rows
        rest: list[_Turn[_W, _R]] = []
        for turn in others:
            fits = not (first.alone or turn.alone) and rows + turn.rows <= self.max_rows
            # Nobody is passed who has waited since this thread's last turn.
            if fits and (not rest or self._served.get(turn.thread, 0) < rest[0].arrived):
                batch.append(turn)
                rows += turn.rows
            else:
                rest.append(turn)
        self._queue = rest
        return batch

    def _all_back(self) -> bool:
        return self._expected <= {t.thread for t in self._queue}

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

    def _note_served(self, began: float) -> None:
        self._tick += 1
        now = time.perf_counter()
        threads = {t.thread for t in self._running}
        oldest = self._queue[0].arrived if self._queue else self._tick
        self._served = {thread: at for thread, at in self._served.items() if at > oldest}
        self._served |= dict.fromkeys(threads, self._tick)
        if not self._running[0].alone:
            self._stepped = {t: at for t, at in self._stepped.items() if at > now - _AWAY_S}
            self._stepped |= dict.fromkeys(threads, now)
            self._expected, self._began, self._ended = threads, began, now

    def _pass_on(self, mine: _Turn[_W, _R]) -> None:
        """Give the lead to the next in line, if any; the state is locked."""
        mine.leads = False
        unserved = [t for t in self._running if not t.done]  # after an interrupt
        self._queue = [t for t in (*unserved, *self._queue) if t is not mine]
        self._running = []
        self._led = bool(self._queue)
        if self._led:
            self._queue[0].leads = True
            self._queue[0].woken.set()

    def _withdraw(self, turn: _Turn[_W, _R]) -> None:
        """Leave after an interrupt; the caller may give its work's memory to others afterwards."""
        while not turn.done:
            with self._state:
                if turn.leads:
                    self._pass_on(turn)
                    return
                if turn not in self._running:
                    self._queue = [t for t in self._queue if t is not turn]
                    return
            turn.woken.wait()  # another thread runs it now
