"""Blocking iterators under an event loop: few threads, no place lost, no deadlock, a stop that is heard."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from rasd_integrations.runtime import aio
from rasd_integrations.runtime.aio import Workers, iterate_in_thread

SOON_S = 10.0


@pytest.fixture
def two_workers(monkeypatch) -> Workers:
    """Give the process two worker threads."""
    workers = Workers(2)
    monkeypatch.setattr(aio, "_workers", workers)
    return workers


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        await asyncio.sleep(0.001)


async def collect(start: Callable[[], Iterator[int]]) -> list[int]:
    return [item async for item in iterate_in_thread(start)]


class Gate:
    """Iterators that begin, wait until they are let through, and yield their number."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.closed: list[int] = []
        self.open = threading.Event()

    def __call__(self, number: int) -> Callable[[], Iterator[int]]:
        def items() -> Iterator[int]:
            self.begun.append(number)
            try:
                assert self.open.wait(SOON_S)
                yield number
            finally:
                self.closed.append(number)

        return items


async def test_items_come_in_order_and_in_the_callers_context():
    """The worker sees the caller's context variables and its items arrive as they were made."""
    name = contextvars.ContextVar("name", default="none")
    name.set("caller")
    assert [0, 1, 2] == await collect(lambda: iter(range(3)))
    assert ["caller"] == [n async for n in iterate_in_thread(lambda: iter([name.get()]))]


async def test_errors_reach_the_consumer_after_the_items_before_them():
    """What the iterator, its maker or its close raises is raised where it is consumed."""

    def failing(*, at_close: bool) -> Iterator[int]:
        try:
            yield 1
            if not at_close:
                msg = "in the middle"
                raise ValueError(msg)
        finally:
            if at_close:
                msg = "at the end"
                raise ValueError(msg)

    seen: list[int] = []

    async def consume(*, at_close: bool) -> None:
        async for item in iterate_in_thread(lambda: failing(at_close=at_close)):
            seen.append(item)  # noqa: PERF401  (what came before the error counts)

    with pytest.raises(ValueError, match="in the middle"):
        await consume(at_close=False)
    with pytest.raises(ValueError, match="at the end"):
        await consume(at_close=True)
    assert [1, 1] == seen

    def refuse() -> Iterator[int]:
        raise KeyError

    with pytest.raises(KeyError):
        await collect(refuse)


async def test_no_more_streams_run_than_there_are_workers(two_workers):
    """A hundred streams at once use two threads, start in their order, and all end."""
    threads: set[int] = set()
    running, most, order = 0, 0, []
    lock = threading.Lock()

    def items(number: int) -> Iterator[int]:
        nonlocal running, most
        with lock:
            running, most = running + 1, max(most, running + 1)
            threads.add(threading.get_ident())
            order.append(number)
        yield number
        with lock:
            running -= 1

    tasks = [collect(lambda n=n: items(n)) for n in range(100)]
    assert [[n] for n in range(100)] == await asyncio.gather(*tasks)
    assert 2 >= most
    assert order == sorted(order)
    await until(lambda: not two_workers.busy)


async def test_a_request_that_is_cancelled_in_the_queue_never_starts(two_workers):
    """Its iterator is not even made, and the ones behind it move up."""
    gate = Gate()
    tasks = [asyncio.create_task(collect(gate(n))) for n in range(5)]
    await until(lambda: len(gate.begun) == 2 and len(two_workers._queued) == 3)
    tasks[3].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[3]
    gate.open.set()
    assert [[0], [1], [2], [4]] == await asyncio.gather(*tasks[:3], tasks[4])
    assert [0, 1, 2, 4] == sorted(gate.begun)


async def test_a_consumer_that_leaves_stops_the_iterator_within_one_item():
    """After the consumer has gone at most the item under way is made, and the iterator is closed."""
    made: list[int] = []
    go_on, closed = threading.Semaphore(0), threading.Event()

    def items() -> Iterator[int]:
        try:
            for number in range(100):
                assert go_on.acquire(timeout=SOON_S)
                made.append(number)
                yield number
        finally:
            closed.set()

    stream = iterate_in_thread(items)
    go_on.release()
    assert 0 == await anext(stream)
    await stream.aclose()
    go_on.release(50)
    await until(closed.is_set)
    assert made in ([0], [0, 1])


async def test_the_stop_is_the_callers_own_event_where_one_is_given():
    """An iterator that waits before its first item can hear that its consumer has left."""
    stopped, ended = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        assert stopped.wait(SOON_S)
        ended.set()
        yield 1

    task = asyncio.create_task(anext(iterate_in_thread(items, stopped)))
    await asyncio.sleep(0.01)
    assert not ended.is_set()
    task.cancel()
    await until(ended.is_set)


async def test_a_slow_consumer_holds_no_worker(two_workers):
    """Streams that nobody reads run to their end, and others get their workers."""
    unread = [iterate_in_thread(lambda: iter(range(1000))) for _ in range(4)]
    assert [0] * 4 == [await anext(stream) for stream in unread]
    assert [7] == await asyncio.wait_for(collect(lambda: iter([7])), SOON_S)
    for stream in unread:
        assert list(range(1, 1000)) == [item async for item in stream]


async def test_streams_inside_streams_do_not_wait_for_one_another(two_workers):
    """With every worker in a stream that waits for a stream of its own, all of them end."""

    def inner() -> Iterator[int]:
        yield from (1, 2)

    def outer() -> Iterator[int]:
        yield sum(asyncio.run(collect(inner)))

    async def consumer() -> int:
        total = 0
        async for item in iterate_in_thread(outer):
            total += item + sum(await collect(inner))  # the consumer needs a worker as well
        return total

    results = asyncio.gather(*(consumer() for _ in range(6)))
    assert [6] * 6 == await asyncio.wait_for(results, SOON_S)


def test_a_loop_that_is_closed_ends_its_streams():
    """Without a loop to tell, the worker stops after one item and gives its place back."""
    workers, made, go_on = Workers(1), [], threading.Event()
    loop = asyncio.new_event_loop()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number
            assert go_on.wait(SOON_S)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aio, "_workers", workers)
        stream = iterate_in_thread(items)
        assert 0 == loop.run_until_complete(anext(stream))
        loop.close()
        go_on.set()
        deadline = time.monotonic() + SOON_S
        while workers.busy and time.monotonic() < deadline:
            time.sleep(0.001)
    assert (False, [0, 1]) == (workers.busy, made)


def test_a_system_without_threads_to_give_loses_no_place(monkeypatch):
    """The error comes to the caller, and the next request finds the worker free."""
    workers, ran = Workers(1), threading.Event()

    def refuse(work: Callable[[], None]) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(aio, "start_thread", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            workers.run(ran.set)
    workers.run(ran.set)
    assert ran.wait(SOON_S)
