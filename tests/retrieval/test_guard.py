"""A store that misbehaves never fails an answer."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from rasd_integrations.retrieval import ChunkSource, GuardedSource
from rasd_integrations.types import Chunk


class Store:
    """A chunk source that does what it is told."""

    def __init__(
        self,
        search=lambda query, k, filter: [],
        document=lambda chunk, filter: [],
        mark=lambda: "mark",
    ):
        self._search, self._document, self._mark = search, document, mark

    def search(self, query, k, *, filter=None):
        return self._search(query, k, filter)

    def document(self, chunk, *, filter=None):
        return self._document(chunk, filter)

    def fingerprint(self):
        return self._mark()


def guarded(result, timeout_s=5.0):
    return GuardedSource(Store(lambda query, k, filter: result), timeout_s)


def raiser(error):
    def search(query, k, filter):
        raise error

    return search


class Hanging:
    """A search that waits until it is let go."""

    def __init__(self):
        self.release, self.calls = threading.Event(), 0

    def __call__(self, query, k, filter):
        self.calls += 1
        self.release.wait(30)
        return [Chunk("late")]


@pytest.fixture
def hanging():
    search = Hanging()
    yield search
    search.release.set()


def settle():
    """Wait for the worker threads to end."""
    for thread in threading.enumerate():
        if thread.name == "rasd-store":
            thread.join(5)


def test_the_fake_is_a_chunk_source():
    """The protocol is told from its methods."""
    assert isinstance(Store(), ChunkSource)


def test_a_good_result_passes_through_and_is_ranked():
    """Ranks count up from 0 in the order of the store."""
    source = guarded([Chunk("a", rank=7), Chunk("b", rank=7)])
    assert source.search("q", 5) == [Chunk("a", rank=0), Chunk("b", rank=1)]
    assert source.take_faults() == ()


def test_the_filter_reaches_the_store():
    """What restricts the pipeline's search restricts this one."""
    seen = []
    source = GuardedSource(
        Store(lambda q, k, f: seen.append(f) or [], lambda c, f: seen.append(f) or []), 5
    )
    source.search("q", 3, filter={"tenant": 1})
    source.document(Chunk("a"), filter={"tenant": 2})
    assert seen == [{"tenant": 1}, {"tenant": 2}]


@pytest.mark.parametrize(
    "error", [ValueError("wrong dimension"), KeyError(3), SystemExit(1), KeyboardInterrupt()]
)
def test_a_store_that_raises_is_an_empty_result_and_a_fault(error, caplog):
    """Errors of every kind, Rust panics and exits included, end in the store's thread."""
    source = GuardedSource(Store(raiser(error)), 5)
    with caplog.at_level(logging.WARNING):
        assert source.search("q", 3) == []
    (fault,) = source.take_faults()
    assert fault.startswith(f"Store.search: {type(error).__name__}")
    assert fault in caplog.text


def test_faults_are_one_line_and_forgotten_once_taken():
    """A page of error text does not end up in an answer's metadata."""
    source = GuardedSource(Store(raiser(ValueError("first\nsecond\n" + "x" * 5000))), 5)
    source.search("q", 3)
    (fault,) = source.take_faults()
    assert "\n" not in fault
    assert len(fault) < 400
    assert source.take_faults() == ()


def test_faults_of_one_thread_are_not_anothers():
    """Two answers at once each report their own faults."""
    source = GuardedSource(Store(raiser(ValueError("mine"))), 5)
    thread = threading.Thread(target=source.search, args=("q", 3))
    thread.start()
    thread.join()
    assert source.take_faults() == ()


def test_a_hanging_store_costs_its_time_limit_once(hanging):
    """The second question does not wait, and starts no thread, while the first call hangs."""
    source = GuardedSource(Store(hanging), 0.1)
    assert source.search("q", 3) == []
    start = time.perf_counter()
    assert source.search("q", 3) == []
    assert time.perf_counter() - start < 0.09
    assert hanging.calls == 1
    assert "no answer within 0.1 s" in source.take_faults()[0]


def test_a_store_that_comes_back_is_asked_again(hanging):
    """Once the late call has ended the store is searched as before."""
    source = GuardedSource(Store(hanging), 0.1)
    source.search("q", 3)
    hanging.release.set()
    settle()
    assert [c.text for c in source.search("q", 3)] == ["late"]


def test_a_hanging_store_does_not_keep_the_process_alive():
    """The interpreter ends while the store still hangs."""
    code = (
        "import threading\n"
        "from rasd_integrations.retrieval import GuardedSource, as_chunk_source\n"
        "source = GuardedSource(as_chunk_source(lambda q, k: threading.Event().wait()), 0.05)\n"
        "print(source.search('q', 3))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


def test_a_store_that_asks_the_model_again_does_not_recurse():
    """The inner search returns nothing and says why; the outer one goes on."""
    inner: list[list[Chunk]] = []

    def search(query, k, filter):
        inner.append(source.search("inner", k))
        return [Chunk("outer")]

    source = GuardedSource(Store(search), 5)
    assert [c.text for c in source.search("q", 3)] == ["outer"]
    assert inner == [[]]


def test_after_a_recursion_the_store_is_searched_again():
    """The guard's mark does not leak out of the call."""
    source = guarded([Chunk("a")])
    source.search("q", 3)
    assert [c.text for c in source.search("q", 3)] == ["a"]


@pytest.mark.parametrize("nonsense", [None, "text", 7, {"a": 1}, iter([Chunk("a")])])
def test_what_is_no_list_is_an_empty_result_and_a_fault(nonsense):
    """A store may return anything at all."""
    source = guarded(nonsense)
    assert source.search("q", 3) == []
    assert len(source.take_faults()) == 1


@pytest.mark.parametrize(
    ("found", "expected", "fault"),
    [
        (
            [Chunk("a"), None, 3, Chunk(None), Chunk(b"bytes"), Chunk("b")],
            [Chunk("a"), Chunk("b", rank=1)],
            "dropped 4 of 6 results",
        ),
        (
            [Chunk("a"), Chunk("  \n"), Chunk(""), Chunk("a"), Chunk("b")],
            [Chunk("a"), Chunk("b", rank=1)],
            None,
        ),
        (
            [Chunk("a", id="1"), Chunk("b", id="1"), Chunk("c", id="2")],
            [Chunk("a", "1"), Chunk("b", None, 1), Chunk("c", "2", 2)],
            None,
        ),
        ([Chunk("a", id=7, metadata=None)], [Chunk("a", id="7", metadata={})], None),
        ([Chunk(str(i)) for i in range(50)], [Chunk(str(i), rank=i) for i in range(9)], None),
    ],
    ids=["no chunks", "empty and repeated", "an id of two", "wrong types", "more than k"],
)
def test_a_result_is_mended(found, expected, fault):
    """One bad row does not cost the good ones; an id of two chunks names the first; k is a limit."""
    source = guarded(found)
    assert source.search("q", 9) == expected
    faults = source.take_faults()
    assert (len(faults) == 0) if fault is None else (fault in faults[0])


def test_a_document_may_repeat_a_text():
    """A refrain stands wherever it stands."""
    chunks = [Chunk("la", metadata={"start_index": 0}), Chunk("la", metadata={"start_index": 9})]
    source = GuardedSource(Store(document=lambda chunk, filter: chunks), 5)
    assert [c.text for c in source.document(chunks[0])] == ["la", "la"]


def test_k_is_bounded_and_nothing_is_asked_for_nothing():
    """Absurd k and empty questions never reach the store."""
    asked = []
    source = GuardedSource(Store(lambda q, k, f: asked.append(k) or []), 5)
    source.search("q", 10**9)
    source.search("q", 0)
    source.search("q", -3)
    source.search("  ", 5)
    assert asked == [1000]


def test_a_document_that_fails_is_empty():
    """Whole documents are guarded as searches are."""

    def document(chunk, filter):
        raise OSError

    source = GuardedSource(Store(document=document), 5)
    assert source.document(Chunk("a")) == []
    assert source.take_faults()[0].startswith("Store.document: OSError")


def test_a_fingerprint_that_fails_matches_nothing():
    """A cache keyed by an unknown state must not hit."""

    def mark():
        raise OSError

    source = GuardedSource(Store(mark=mark), 5)
    assert source.fingerprint() != source.fingerprint()


def test_many_threads_share_one_guard():
    """Answers at once each get their own result."""
    source = GuardedSource(Store(lambda q, k, f: [Chunk(q)]), 5)
    results: dict[int, str] = {}

    def ask(i):
        with suppress(IndexError):
            results[i] = source.search(f"question {i}", 1)[0].text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: f"question {i}" for i in range(20)}
