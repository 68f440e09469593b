"""The memory of a namespace: only what the pipeline's own search may return, bounded, and never in an answer's way."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
from fakes_memory import Listed, drafted, new_memory, settled, settled_check, text_of
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.vectorstores import InMemoryVectorStore

from rasd_integrations.datastores.tokens import answers, collection
from rasd_integrations.datastores.tokens.collection import View
from rasd_integrations.datastores.tokens.memory import Memories, Memory
from rasd_integrations.datastores.tokens.quiet import Quiet
from rasd_integrations.datastores.tokens.shard import continuations
from rasd_integrations.drafters import AnswersDrafter, CollectionDrafter
from rasd_integrations.retrieval import as_chunk_source
from rasd_integrations.types import DraftContext, TokenBlock

TENANTS = ("a", "b")


def answered(memory, prompt, ids) -> tuple[int, ...]:
    """Give an answer; return what was drafted first."""
    session = AnswersDrafter(memory).start(DraftContext(prompt_ids=tuple(prompt)))
    first = session.propose(4).token_ids
    session.observe(TokenBlock(tuple(ids), finish_reason="stop"))
    session.close()
    return first


# --- the collection ---


def proposed(view: View, ids: Sequence[int]) -> list[list[int]]:
    """Return the token after each occurrence of the last ``ids`` that may be drafted from."""
    return continuations(view.shards(), ids, min_match=1, most_rows=9, depth=1, may=view.may)[1]


def waited(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.001)


def test_the_texts_of_a_store_are_drafted_from():
    """Read in the background; what was added is read by a later answer."""
    memory, source = new_memory(), Listed([text_of([1, 2, 3, 4])])
    assert drafted(memory, [1, 2], source) == (3, 4)
    assert drafted(memory, [7, 8], source) == ()
    source.held["new"] = text_of([7, 8, 9]), ""
    settled(memory, source)
    assert drafted(memory, [7, 8], source) == (9,)


def test_what_was_deleted_is_forgotten_by_the_next_answer():
    """Also a text that another chunk held too, once both are gone, and one that was replaced under a new key."""
    memory = new_memory()
    source = Listed({"x": "1 2 3", "y": "1 2 3", "z": "5 6 7"})
    assert drafted(memory, [1, 2], source) == (3,)
    del source.held["x"]
    assert drafted(memory, [1, 2], source) == (3,)
    del source.held["y"]
    assert drafted(memory, [1, 2], source) == ()
    assert drafted(memory, [5, 6], source) == (7,)


def test_nothing_is_drafted_before_the_store_was_asked_again():
    """An answer that starts while the store does not answer drafts without it, and waits for nothing."""
    memory, source = new_memory(), Listed(["1 2 3"])
    assert drafted(memory, [1, 2], source) == (3,)
    held = threading.Event()
    source.before = held.wait
    del source.held["1 2 3"]
    started = time.perf_counter()
    view = memory.collection(source, None)
    assert view is not None
    assert proposed(view, [1, 2]) == []
    assert time.perf_counter() - started < 0.1
    held.set()
    settled_check(memory, source)
    assert sum(shard.num_tokens for shard in view.shards()) == 0


def test_a_slow_list_waits_for_quiet_and_an_answer_has_what_it_drafts_from_read_again(monkeypatch):
    """Neither a text that is gone is drafted from nor one that was replaced; a new answer asks again."""
    monkeypatch.setattr(collection, "_CHEAP_S", -1.0)
    monkeypatch.setattr(collection, "_PAUSE_S", 0.0)
    memory = new_memory()
    source = Listed({"x": "1 2 3 4 5", "y": "6 7 8 9 10", "z": "11 12 13 14 15"})
    settled(memory, source)
    del source.held["y"]
    source.held["z"] = "11 12 13 14 16", ""
    listed = source.calls["keys"]
    answers_now = threading.Event()
    source.before = answers_now.wait
    with memory.quiet.answer():
        view = memory.collection(source, None)
        assert view is not None
        for start, expected in ((1, [[5]]), (6, []), (11, [])):
            read = source.calls["read"]
            ids = [*range(start, start + 4)]
            answers_now.clear()
            assert proposed(view, ids) == []  # not read again yet
            answers_now.set()
            waited(lambda read=read: source.calls["read"] > read)
            waited(lambda ids=ids, expected=expected: proposed(view, ids) == expected)
        assert proposed(view, [3, 4]) == [[5]]
        answers_now.clear()
        again = memory.collection(source, None)
        assert again is not None
        assert proposed(again, [3, 4]) == []
        answers_now.set()
        waited(lambda: proposed(again, [1, 2, 3, 4]) == [[5]])
        assert source.calls["keys"] == listed
    settled(memory, source)
    assert source.calls["keys"] > listed
    assert drafted(memory, [12, 13, 14], source) == (16,)


def test_a_short_match_has_nothing_read_again(monkeypatch):
    """Most of them are accidents."""
    monkeypatch.setattr(collection, "_CHEAP_S", -1.0)
    memory, source = new_memory(), Listed(["1 2 3 4 5"])
    settled(memory, source)
    read = source.calls["read"]
    with memory.quiet.answer():
        view = memory.collection(source, None)
        assert view is not None
        assert [proposed(view, [3, 4]) for _ in range(9)] == [[]] * 9
        time.sleep(0.05)
    assert source.calls["read"] == read


def test_a_slow_list_is_asked_for_beside_answers_that_never_end(monkeypatch):
    """After a while, so that what was added is drafted from at last."""
    monkeypatch.setattr(collection, "_CHEAP_S", -1.0)
    monkeypatch.setattr(collection, "_LATE_S", 0.1)
    monkeypatch.setattr(collection, "_REST_S", 0.0)
    memory, source = new_memory(), Listed(["1 2 3"])
    with memory.quiet.answer():
        assert drafted(memory, [1, 2], source) == (3,)


@pytest.mark.parametrize("call", ["keys", "read"])
def test_a_store_that_fails_costs_drafts_only(call, caplog):
    """It is logged once; a later answer asks again."""
    memory, source = new_memory(), Listed(["1 2 3"])
    stock = getattr(source, call)

    def fail(*_: object, **__: object) -> None:
        msg = "gone away"
        raise OSError(msg)

    setattr(source, call, fail)
    for _ in range(3):
        settled(memory, source)
    assert [r.message for r in caplog.records if "gone away" in r.message].__len__() == 1
    setattr(source, call, stock)
    assert drafted(memory, [1, 2], source) == (3,)


def test_a_filter_holds_its_texts_apart():
    """Each filter of a store has a collection of its own; no filter is all of it."""
    memory, source = new_memory(), Listed({"x": "1 2 3"}, tenant="a")
    source.held["y"] = "1 2 4", "b"
    assert drafted(memory, [1, 2], source, "a") == (3,)
    assert drafted(memory, [1, 2], source, "b") == (4,)
    assert set(drafted(memory, [1, 2], source)) == {3, 4}


def test_a_store_that_cannot_be_listed_has_no_texts():
    """Any other object is let be."""
    assert new_memory().collection(object(), None) is None
    assert new_memory().collection(None, None) is None


def test_of_a_large_store_the_newest_chunks_are_kept(monkeypatch, caplog):
    """New ones take the place of the oldest, and it is said once that not all are read."""
    monkeypatch.setattr(collection, "MOST_TOKENS", 40)
    monkeypatch.setattr(collection, "_MOST_CHUNKS", 30)
    monkeypatch.setattr(collection, "_PIECE", 1)
    memory, source = new_memory(), Listed([text_of([10 * i, 10 * i + 1]) for i in range(100)])
    settled(memory, source)
    held = memory.collection(source, None)
    assert held is not None
    settled_check(memory, source)
    assert sum(shard.num_tokens for shard in held.shards()) == 40
    assert drafted(memory, [990], source) == (991,)
    assert drafted(memory, [10], source) == ()
    source.held["new"] = "5 6", ""
    settled(memory, source)
    assert drafted(memory, [5], source) == (6,)
    assert drafted(memory, [990], source) == (991,)
    asked = source.calls["read"]
    settled(memory, source)
    assert source.calls["read"] == asked  # what does not fit is not read at every answer
    assert sum("newest" in record.message for record in caplog.records) == 1


def test_reading_rests_while_answers_run(monkeypatch):
    """But for a small piece now and then."""
    monkeypatch.setattr(collection, "_LATE_S", 0.0)
    monkeypatch.setattr(collection, "_REST_S", 0.2)
    memory, source = new_memory(), Listed([text_of([i, i + 1]) for i in range(300)])
    with memory.quiet.answer():
        memory.collection(source, None)
        time.sleep(0.1)
        assert source.calls["read"] == 0
        until = time.monotonic() + 10
        while not source.calls["read"]:
            assert time.monotonic() < until
            time.sleep(0.01)
        read = memory.collection(source, None)
        assert read is not None
        settled_check(memory, source)
        assert sum(shard.num_tokens for shard in read.shards()) <= 4 * collection._SMALL_PIECE
    settled(memory, source)
    assert drafted(memory, [299], source) == (300,)


# --- the answers ---


def test_an_answer_is_drafted_from_the_ones_before():
    """From its first token, which follows the same end of the prompt."""
    memory = new_memory()
    assert answered(memory, [90, 91], [1, 2, 3, 4]) == ()
    assert answered(memory, [80, 91], [1, 2, 9, 9]) == (1, 2, 3, 4)


def test_the_least_recently_useful_answers_are_evicted():
    """An answer whose tokens come again is useful; more tokens than the limit are never kept."""
    held = answers.Answers(lambda text: [ord(c) for c in text], max_tokens=100)
    useful = list(range(20))
    held.add([], useful)
    for i in range(1, 20):
        held.add([], range(100 * i, 100 * i + 10))
        held.add([], [*range(4, 14), 7000 + i])  # repeats ten tokens of the first
        assert held.store.num_tokens <= 100
    left = [ids.tolist() for _, ids in held.store.rows()]
    assert useful in left
    assert [*range(100, 110)] not in left


def test_forgetting_an_answer_a_text_and_all():
    """By what a text says, in answers and in the collection, or the whole namespace."""
    memory, source = new_memory(), Listed(["30 31 32", "40 41 42"])
    assert drafted(memory, [30], source) == (31, 32)
    for ids in ([1, 2, 3, 4], [5, 2, 3, 6], [7, 8, 9, 9]):
        answered(memory, [], ids)
    assert memory.forget("2 3") == 2
    assert answered(memory, [], [0]) == ()
    assert memory.forget("30 31 32") == 0
    assert drafted(memory, [30], source) == ()
    assert drafted(memory, [40], source) == (41, 42)
    assert memory.forget() == 1
    assert len(memory.answers.store) == 0


# --- namespaces ---


def test_only_so_many_namespaces_are_held():
    """The last used ones; each is the same object until then."""
    memories = Memories(lambda text: [1], "model")
    first = memories.of("0")
    assert memories.of("0") is first
    for i in range(1, 64):
        memories.of(str(i))
    assert memories.of("0") is first
    memories.of("64")
    memories.of("65")
    assert memories.of("1") is not first
    assert memories.of("0") is first


def drafted_unlisted(memory: Memory, ids: Sequence[int], source: Listed, filter: Any) -> Any:
    """Return what is drafted while an answer runs, which a slow list waits for; then have it listed."""
    with memory.quiet.answer():
        context = DraftContext(prompt_ids=tuple(ids), source=source, filter=filter)
        session = CollectionDrafter(memory).start(context)
        read = memory._collection(source, filter)
        first = session.propose(1).token_ids
        waited(lambda: not read._wanted)
        tokens = first or session.propose(1).token_ids
    settled(memory, source, filter)
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize(("turns", "drafted"), [(10_000, drafted), (2_000, drafted_unlisted)])
def test_no_draft_comes_from_another_tenant_or_from_a_deleted_text(turns, drafted, monkeypatch):
    """Answers of two namespaces and filters over stores that change: each token of a draft has a source."""
    if drafted is drafted_unlisted:
        monkeypatch.setattr(collection, "_CHEAP_S", -1.0)
        monkeypatch.setattr(collection, "_LONG", 1)
    draw = random.Random(5)
    memories = {tenant: new_memory() for tenant in TENANTS}
    source = Listed()
    said = {tenant: set() for tenant in TENANTS}  # pairs of tokens of its answers
    proposed = 0
    for turn in range(turns):
        tenant = draw.choice(TENANTS)
        other = draw.choice((tenant, None))
        if draw.random() < 0.3:  # a store that changes, also in another's favour
            name = str(draw.randrange(40))
            if draw.random() < 0.5:
                source.held.pop(name, None)
            else:
                source.held[f"{turn}"] = text_of(draw.choices(range(12), k=6)), draw.choice(TENANTS)
                for old in [*source.held][:-40]:
                    del source.held[old]
        context = draw.choices(range(12), k=2)
        allowed = [t for t, owner in source.held.values() if other is None or owner == other]
        pairs = {pair for text in allowed for pair in pairwise(map(int, text.split()))}
        memory = memories[tenant]
        tokens = drafted(memory, context, source, other)[:1]
        assert all((context[-1], token) in pairs for token in tokens), turn
        ids = [1000 * (1 + TENANTS.index(tenant)) + draw.randrange(9) for _ in range(3)]
        own = answered(memory, [ids[0]], ids[1:])
        assert all((ids[0], token) in said[tenant] for token in own[:1]), turn
        said[tenant] |= {*pairwise(ids)}
        proposed += bool(tokens) + bool(own)
    assert proposed > turns / 2


# --- real stores ---


def stores() -> dict[str, Any]:
    """Return functions that make a store of two texts; each returns the store, and one that deletes the first."""
    texts = ["alpha beta gamma", "delta epsilon zeta"]

    def chroma():
        client = pytest.importorskip("chromadb").EphemeralClient()
        made = client.get_or_create_collection(f"m{uuid.uuid4().hex}")
        made.add(ids=["0", "1"], documents=texts, embeddings=[[0.0], [1.0]], metadatas=META)
        return as_chunk_source(made, embed=lambda t: [[0.0] for _ in t]), lambda: made.delete(["0"])

    def langchain_memory():
        made = InMemoryVectorStore(DeterministicFakeEmbedding(size=4))
        made.add_texts(texts, ids=["0", "1"], metadatas=META)
        return as_chunk_source(made), lambda: made.delete(["0"])

    def langchain_faiss():
        faiss = pytest.importorskip("langchain_community.vectorstores").FAISS
        made = faiss.from_texts(texts, DeterministicFakeEmbedding(size=4), META, ids=["0", "1"])
        return as_chunk_source(made), lambda: made.delete(["0"])

    def llama_index():
        core = pytest.importorskip("llama_index.core")
        nodes = [
            core.schema.TextNode(text=t, id_=str(i), metadata=META[i]) for i, t in enumerate(texts)
        ]
        made = core.VectorStoreIndex(nodes, embed_model=core.MockEmbedding(4))
        return as_chunk_source(made), lambda: made.delete_nodes(["0"], delete_from_docstore=True)

    def listed():
        made = list(texts)
        return as_chunk_source(made), lambda: made.pop(0)

    return {f.__name__: f for f in (chroma, langchain_memory, langchain_faiss, llama_index, listed)}


META = [{"tenant": "a"}, {"tenant": "b"}]


@pytest.mark.parametrize("kind", [*stores()])
def test_texts_of_real_stores_are_read_and_forgotten(kind):
    """One id a character; a deleted text is gone for the next answer."""
    source, delete = stores()[kind]()
    memory = Memory(lambda text: [ord(c) for c in text], Quiet())

    def after(text: str) -> str:
        return "".join(map(chr, drafted(memory, [ord(c) for c in text], source, n=3)))

    assert (after("alpha b"), after("delta e")) == ("eta", "psi")
    delete()
    assert (after("alpha b"), after("delta e")) == ("", "psi")


def test_the_filter_of_a_retriever_holds():
    """What its store holds besides is not read; two retrievers alike share one collection."""
    store = InMemoryVectorStore(DeterministicFakeEmbedding(size=4))
    store.add_texts(["alpha beta", "alpha zeta"], metadatas=META)
    memory = Memory(lambda text: [ord(c) for c in text], Quiet())

    def only_a(document) -> bool:
        return document.metadata["tenant"] == "a"

    for _ in range(2):
        kept = store.as_retriever(search_kwargs={"filter": only_a})
        found = drafted(memory, [ord(c) for c in "alpha "], as_chunk_source(kept), n=8)
        assert "".join(map(chr, found)) == "beta"
    assert len(memory._collections) == 1
