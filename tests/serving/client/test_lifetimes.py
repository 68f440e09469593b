"""Clients outlive event loops, threads and forks, and are closed with what made them."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import pytest
from fake_server import ANSWER, Says, fake_server

from rasd_integrations.errors import DecodingError
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.runtime.together import as_they_end
from rasd_integrations.serving.client.connection import ServerOptions
from rasd_integrations.serving.client.remote import RemoteRASD

ASKED = Request([{"role": "user", "content": "2 + 2?"}])


def remote(server):
    """Return the client of a server."""
    return RemoteRASD(ServerOptions(base_url=server.base_url, max_retries=0))


def settles(server, seconds=5.0):
    """Return if the server has no connection within this time."""
    ends = time.monotonic() + seconds
    while server.connections and time.monotonic() < ends:
        time.sleep(0.01)
    return not server.connections


def test_each_event_loop_has_a_client_that_ends_with_it():
    """Three loops, one after the other; their connections are closed by them."""
    with fake_server() as server, closing(remote(server)) as engine:

        async def two():
            return [(await engine.agenerate(ASKED)).text for _ in range(2)]

        assert [["Four."] * 2] * 3 == [asyncio.run(two()) for _ in range(3)]
        assert settles(server)


def test_loops_in_threads_at_once():
    """A connection is never used by a loop that did not open it."""
    with fake_server() as server, closing(remote(server)) as engine, ThreadPoolExecutor(4) as pool:

        async def four():
            return [
                a.text for a in await asyncio.gather(*(engine.agenerate(ASKED) for _ in range(4)))
            ]

        answers = list(pool.map(lambda _: asyncio.run(four()), range(4)))
        assert [["Four."] * 4] * 4 == answers
        assert 16 == engine.stats.prompt_tokens // 7


def test_a_connection_is_used_again():
    """Requests that follow one another open one."""
    says = [Says(body={"tokens": [5]})]
    with fake_server(*says) as server, closing(remote(server)) as engine:
        assert [[5], [5]] == [engine.encode("a"), engine.encode("b")]
        assert (3, 1) == (len(server.paths), server.opened)


async def test_close_ends_connections_and_later_calls():
    """Of threads and of the loop that runs."""
    with fake_server() as server:
        engine = remote(server)
        engine.generate(ASKED)
        await engine.agenerate(ASKED)
        engine.close()
        assert await asyncio.to_thread(settles, server)
        with pytest.raises(DecodingError, match="closed"):
            engine.generate(ASKED)
        with pytest.raises(DecodingError, match="closed"):
            await engine.agenerate(ASKED)


def test_one_that_is_dropped_holds_no_connection():
    """Nobody has to call close()."""
    with fake_server() as server:
        engine = remote(server)
        engine.generate(ASKED)
        del engine
        gc.collect()
        assert settles(server)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_its_own():
    """Two processes never write to one connection."""
    with fake_server() as server, closing(remote(server)) as engine:
        engine.ensure_loaded()
        assert server.opened == 1
        context = multiprocessing.get_context("fork")
        said, tells = context.Pipe(duplex=False)
        child = context.Process(target=lambda: tells.send(engine.generate(ASKED).text))
        child.start()
        assert said.poll(20)
        assert ("Four.", 2) == (said.recv(), server.opened)
        child.join(10)
        assert "Four." == engine.generate(ASKED).text
        assert server.opened == 2


async def test_a_task_that_is_cancelled_ends_the_request():
    """While the server is silent."""
    with fake_server(Says([ANSWER[0], 30.0])) as server:
        engine = remote(server)
        task = asyncio.create_task(engine.agenerate(ASKED))
        assert await asyncio.to_thread(server.asked.wait, 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.left.wait, 5)
        engine.close()


def test_a_batch_that_is_left_ends_its_requests():
    """All of them, also those that the server has not answered yet."""
    with fake_server(Says(), Says([30.0])) as server, closing(remote(server)) as engine:
        engine.ensure_loaded()

        def job():
            return "".join(delta.text for delta in engine.stream_to_end(ASKED))

        started = time.perf_counter()
        with closing(as_they_end([job] * 3, 3)) as ended:
            assert "Four." == next(ended)[1]
        assert server.left.wait(5)
        assert time.perf_counter() - started < 10


def test_an_error_of_a_batch_reaches_its_caller():
    """A fault of one answer is raised, not a fault of the loop around it."""
    with fake_server(Says(ANSWER[:1])) as server, closing(remote(server)) as engine:
        job = partial(lambda: list(engine.stream_to_end(ASKED)))
        with pytest.raises(Exception, match="before the answer's end"):
            list(as_they_end([job] * 2, 2))


def test_threads_at_once():
    """One client answers them all."""
    with fake_server() as server, closing(remote(server)) as engine, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: engine.generate(ASKED).text, range(16)))

    assert ["Four."] * 16 == answers
    assert threading.active_count() < 40
