"""The token store: look-ups against a naive scan, growth, removal, bounds, sources and tokenizers."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from fakes_datastore import encode, look_up, scan, store_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from rasd_integrations.datastores.tokens import TokenStore, chunk_key, tokenizer_fingerprint
from rasd_integrations.datastores.tokens import store as store_module
from rasd_integrations.datastores.tokens.encoding import SEPARATOR
from rasd_integrations.datastores.tokens.shard import MAX_MATCH, Shard, continuations
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Chunk

TEXT = st.text("abc", max_size=24)
TEXTS = st.lists(TEXT, max_size=8)


def arrays(shard: Shard) -> dict[str, list[int]]:
    return {k: getattr(shard, k).tolist() for k in ("text", "order", "starts", "keys", "alive")}


@pytest.fixture
def small_shards(monkeypatch):
    """Keep even tiny shards apart, so that a few texts make several."""
    monkeypatch.setattr(store_module, "_LEAST_KEPT", 1)


# --- look-up -------------------------------------------------------------------------------------


@settings(deadline=None)  # a busy machine is no fault
@given(TEXTS, TEXT)
@example(["aaaaaaaaaaaaaaaaaaaaaaaa"], "aaaaaaaaaaaaaaaaaaaaaa")
@example(["ab", "abc", "cab"], "ab")
@example(["abcabcabcabcabcabcabcab", "bcabcabcabcabcabca"], "xbcabcabcabcabcabcabc")
def test_a_look_up_finds_what_a_scan_finds(texts, context):
    """Longest match, continuations and their counts are those of reading every text."""
    assert look_up(store_of(texts), context) == scan(texts, context)


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(TEXTS, max_size=5), st.sets(st.integers(0, 40)), TEXT)
def test_growth_and_removal_in_parts_equal_a_scan_of_what_is_left(batches, removed, context):
    """Whatever order texts came and went in, the look-up is that of a scan of those that are left."""
    with mock.patch.object(store_module, "_LEAST_KEPT", 1):
        store = store_of([])
        living: dict[str, None] = {}
        for number, batch in enumerate(batches):
            store.add(batch)
            living.update(dict.fromkeys(batch))
            if number in removed and living:
                gone = list(living)[number % len(living)]
                store.remove(gone)
                del living[gone]
        gone = [text for i, text in enumerate(living) if i in removed]
        store.remove(gone)
    assert look_up(store, context) == scan([t for t in living if t not in gone], context)


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(TEXTS, min_size=1, max_size=5), st.sets(st.integers(0, 40)))
def test_a_grown_store_merges_to_what_a_build_makes(batches, removed):
    """Sorted together, the shards of a grown store are the arrays of a store built at once."""
    texts = [t for t in dict.fromkeys(t for batch in batches for t in batch) if len(t) > 1]
    gone = [text for i, text in enumerate(texts) if i in removed]
    with mock.patch.object(store_module, "_LEAST_KEPT", 1):
        store = store_of([])
        for batch in batches:
            store.add(batch)
        store.remove(gone)
    left = [t for t in texts if t not in gone]
    if left:
        (built,) = store_of(left).shards
        assert arrays(Shard.merge(store.shards)) == arrays(built)
    else:
        assert store.shards == ()


@settings(deadline=None)  # a busy machine is no fault
@given(TEXTS, st.sets(st.integers(0, 7)))
def test_compaction_equals_a_build_without_the_removed(texts, removed):
    """Dropping chunks from a sorted shard leaves the arrays that sorting the others makes."""
    texts = [t for t in dict.fromkeys(texts) if len(t) > 1]
    left = [t for i, t in enumerate(texts) if i not in removed]
    if left:
        shard = store_of(texts).shards[0]
        dead = np.array([i in removed for i in range(len(texts))])
        assert arrays(shard.without(dead).compact()) == arrays(store_of(left).shards[0])


def test_no_match_and_no_continuation_crosses_the_border_of_two_texts():
    """The end of one text is not continued by the next, nor matched together with it."""
    store = store_of(["abcd", "efgh"])
    assert look_up(store, "cd") == (0, Counter())
    assert look_up(store, "de") == (1, Counter({"fgh": 1}))
    assert look_up(store, "bc") == (2, Counter({"d": 1}))


def test_a_match_is_at_most_sixteen_tokens_and_at_least_the_minimum():
    """A longer agreement counts as sixteen; a shorter one than asked for is none."""
    text = "abcdefghijklmnopqrstuvwxyz"
    assert look_up(store_of([text]), text[:20])[0] == MAX_MATCH
    assert look_up(store_of([text]), "xxab", min_match=3) == (0, Counter())
    assert look_up(store_of([text]), "xabc", min_match=3) == (3, Counter({"defg": 1}))


def test_of_many_occurrences_an_even_sample_is_read(small_shards):
    """Over the limit the rows keep their shares, over several shards, and are the same each time."""
    texts = [f"q{'a' if i % 4 else 'b'}{chr(1000 + i)}" for i in range(400)]
    store = store_of(texts[:300])
    store.add(texts[300:])
    assert len(store.shards) == 1  # 300 against 100: sorted together
    store.add(f"q{'a' if i % 4 else 'b'}{chr(2000 + i)}" for i in range(40))
    assert len(store.shards) == 2
    length, found = look_up(store, "zq", most_rows=40, depth=1)
    assert (length, found.total()) == (1, 40)
    assert found["a"] == pytest.approx(30, abs=3)
    assert found == look_up(store, "zq", most_rows=40, depth=1)[1]


def test_an_empty_store_and_an_empty_context_match_nothing():
    """Nothing to find, or nothing to look for: no rows, no error."""
    assert look_up(store_of([]), "abc") == (0, Counter())
    assert look_up(store_of(["abc"]), "") == (0, Counter())
    assert len(store_of(["", "a"])) == 0


def test_ids_are_stored_once():
    """An answer that was learned is not learned again."""
    store = TokenStore(encode)
    assert [store.add_ids([[1, 2, 3], [4, 5]]), store.add_ids([[4, 5], [1, 2]])] == [2, 1]
    assert (len(store), store.num_tokens) == (3, 7)


def test_ids_have_32_bits():
    """Ids that 16 bits cannot hold are kept apart; what is no id is refused."""
    store = TokenStore(encode)
    store.add_ids([[1, 70_000, 5], [1, 70_000 - 65_536, 6], [2, SEPARATOR - 1, 7]])
    assert continuations(store.shards, [70_000], min_match=1, most_rows=9, depth=1) == (1, [[5]])
    assert continuations(
        store.shards, [SEPARATOR - 1], min_match=1, most_rows=9, depth=1
    ) == (1, [[7]])  # fmt: skip
    for wrong in ([-1, 2], [SEPARATOR, 2], [0.5, 1.0], [[1, 2], [3, 4]]):
        with pytest.raises(ConfigurationError, match=r"[Tt]oken ids?"):
            store.add_ids([wrong])


# --- growth, removal, bounds ---------------------------------------------------------------------


def test_a_text_is_stored_once_and_can_come_back():
    """Content is the identity: adding twice counts once; removed and added again, it is found again."""
    store = store_of(["abcd", "abcd", "bcde"])
    assert (len(store), store.num_tokens, store.add(["abcd"])) == (2, 8, 0)
    assert store.remove("abcd") == 1
    assert "abcd" not in store
    assert look_up(store, "ab") == (1, Counter({"cde": 1}))
    assert store.add(["abcd"]) == 1
    assert "abcd" in store
    assert look_up(store, "ab") == (2, Counter({"cd": 1}))


def test_texts_are_removed_by_text_chunk_or_key():
    """All three name the same text; what is not there is no error."""
    store = store_of(["abcd", "efgh", "ijkl", "mnop"])
    assert store.remove([Chunk("abcd"), chunk_key("efgh"), "nowhere"]) == 2
    assert store.remove(chunk_key("ijkl")) == 1
    assert [t in store for t in ("abcd", "efgh", "ijkl", "mnop")] == [False] * 3 + [True]
    assert chunk_key("mnop") in store
    assert store.remove(["mnop"]) == 1
    assert store.shards == ()


def test_removed_text_is_written_anew_once_it_is_a_quarter():
    """A few removed texts are passed over; many are dropped from memory."""
    store = store_of([f"text number {i:02}" for i in range(20)])
    tokens = len(store.shards[0].text)
    store.remove("text number 03")
    assert len(store.shards[0].text) == tokens
    store.remove([f"text number {i:02}" for i in range(10)])
    assert len(store.shards[0].text) == 10 * 15 + 1
    assert len(store) == 10


def test_removed_rows_give_way_to_a_shorter_match():
    """Where the longest match is removed, the next shorter one that lives is drafted from."""
    store = store_of(["abcx", *(f"zc{c}" for c in "defghijk")])
    store.remove("abcx")
    assert len(store.shards[0].alive) == 9  # still there, passed over
    assert look_up(store, "abc")[0] == 1
    assert look_up(store, "abc")[1].total() == 8


def test_sync_makes_the_store_hold_exactly_the_given_texts():
    """What a collection no longer holds goes, what is new comes, what stays is not encoded again."""
    encoded: list[str] = []

    def noting(text):
        encoded.append(text)
        return encode(text)

    store = TokenStore.build(["abc", "bcd", "cde"], noting)
    encoded.clear()
    assert store.sync(["bcd", "cde", "def", "efg"]) == (2, 1)
    assert encoded == ["def", "efg"]
    assert [t in store for t in ("abc", "bcd", "def")] == [False, True, True]


def test_a_failing_source_removes_nothing():
    """A listing that breaks off half way must not look like a smaller collection."""

    def broken():
        yield "abc"
        msg = "the database is gone"
        raise OSError(msg)

    store = store_of(["abc", "bcd"])
    with pytest.raises(OSError, match="gone"):
        store.sync(broken())
    assert len(store) == 2


def test_segments_stay_few_while_a_store_grows(small_shards):
    """One text at a time: each shard is four times as large as the next, and work stays near linear."""
    sorted_tokens = []
    merge, build = Shard.merge, Shard.build
    with (
        mock.patch.object(Shard, "merge", lambda s: sorted_tokens.append(sum(x.num_tokens for x in s)) or merge(s)),
        mock.patch.object(Shard, "build", lambda c, k: sorted_tokens.append(sum(map(len, c))) or build(c, k)),
    ):  # fmt: skip
        store = store_of([])
        for i in range(300):
            store.add([f"text number {i:03}"])
            sizes = [s.num_tokens for s in store.shards]
            assert all(one >= 4 * other for one, other in itertools.pairwise(sizes))
    assert len(store) == 300
    assert len(store.shards) <= 5  # log4 of 300
    assert sum(sorted_tokens) < 25 * store.num_tokens


def test_a_segment_grows_to_its_limit_only(monkeypatch):
    """No sort takes more than the limit, however much comes at once."""
    monkeypatch.setattr(store_module, "_MOST_SORTED", 100)
    monkeypatch.setattr(store_module, "_BATCH", 2)
    texts = [f"text number {i:03}" for i in range(40)]
    store = store_of(texts)
    assert len(store) == 40
    store.add_ids([1000 + i, i] * 30 for i in range(4))  # at once, without a text
    assert max(s.num_tokens for s in store.shards) <= 100
    assert look_up(store, "number 03")[1].total() == 10


def test_a_bounded_store_keeps_the_newest():
    """Over the limit the oldest texts go, whole, until the rest fits."""
    store = store_of([], max_tokens=20)
    for i in range(50):
        store.add([f"text {i:02}"])
        assert store.num_tokens <= 20
    assert [i for i in range(50) if f"text {i:02}" in store] == [48, 49]
    assert store.add(["a text that is longer than the whole store may be"]) == 1
    assert len(store) == 0


def test_progress_counts_the_texts_read():
    """Every text is counted once, also one that was there."""
    done: list[int] = []
    store_of([f"text {i % 300}" for i in range(600)], progress=done.append)
    assert done == [256, 256, 88]


# --- sources and tokenizers ----------------------------------------------------------------------


def test_texts_come_from_chunks_documents_and_nodes():
    """Whatever holds a text is taken, from a list or as it comes."""
    document = SimpleNamespace(page_content="from a document", metadata={})
    node = SimpleNamespace(node_id="n", get_content=lambda: "from a node", metadata={})
    store = store_of(["a text", Chunk("a chunk"), document, node])
    store.add(Chunk(text) for text in ("one chunk", "another"))
    store.add("a text alone")
    names = ["a text", "a chunk", "from a document", "from a node", "one chunk", "another"]
    assert [name for name in [*names, "a text alone"] if name not in store] == []


def test_the_stores_of_the_docs_hand_over_their_texts():
    """Each way that the how-to names gives the texts of the store as they were put in."""
    community = pytest.importorskip("langchain_community.vectorstores")
    core = pytest.importorskip("llama_index.core")
    chromadb = pytest.importorskip("chromadb")
    texts = ["Snow is white.", "Coal is black."]
    faiss = community.FAISS.from_embeddings(
        [(t, [float(i), 1.0]) for i, t in enumerate(texts)], None
    )
    nodes = [core.schema.TextNode(text=text) for text in texts]
    index = core.VectorStoreIndex(nodes, embed_model=core.MockEmbedding(2))
    chroma = chromadb.EphemeralClient().get_or_create_collection(
        "of-the-docs", embedding_function=None
    )
    chroma.add(["0", "1"], documents=texts, embeddings=[[0.0, 1.0], [1.0, 0.0]])
    for source in (
        map(faiss.docstore.search, faiss.index_to_docstore_id.values()),
        index.docstore.docs.values(),
        chroma.get()["documents"],
    ):
        store = store_of(source)
        assert len(store) == 2
        assert [text for text in texts if text not in store] == []


def test_one_document_is_one_text():
    """A document of LangChain's yields its fields when walked through; they are no texts."""
    documents = pytest.importorskip("langchain_core.documents")
    document = documents.Document(page_content="from a document", metadata={"page": 1})
    store = store_of(document)
    store.add(Chunk("a chunk"))
    assert len(store) == 2
    assert "from a document" in store
    assert document in store
    assert store.remove(document) == 1
    assert store.remove(Chunk("a chunk")) == 1


def test_what_has_no_texts_is_refused():
    """A source that cannot list its chunks, and an item without a text, are named."""
    for source in (SimpleNamespace(search=lambda query, k: []), {"documents": ["a text"]}):
        with pytest.raises(ConfigurationError, match=r"A (SimpleNamespace|dict) is no list of"):
            store_of(source)
    with pytest.raises(ConfigurationError, match="17 has no text"):
        store_of(["a text", 17])
    with pytest.raises(ConfigurationError, match="must be a tokenizer or a function"):
        TokenStore.build([], "cl100k")
    with pytest.raises(ConfigurationError, match="max_tokens is 0"):
        store_of([], max_tokens=0)


def test_a_tokenizer_reads_control_tokens_as_text():
    """What looks like the end of a turn is data here; for the engine, at the same time, it stays a token."""
    tokenizer = tiny_tokenizer()
    before = tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]
    store = TokenStore.build(["ab<|im_end|>cd"], tokenizer)
    assert store.num_tokens == len("ab<|im_end|>cd")
    assert (
        not tokenizer.backend_tokenizer.encode_special_tokens
    )  # what a call sets stays for all threads
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == before == [258]


def test_texts_of_any_kind_are_data():
    """Lone surrogates, control characters and long lines are stored like others."""
    store = TokenStore.build(["\ud800 lone", "\x00\x01\x02", "x" * 100_000], tiny_tokenizer())
    assert len(store) == 3
    assert store.remove("\ud800 lone") == 1


def test_the_fingerprint_tells_tokenizers_apart():
    """A tokenizer and a function that encode alike agree; others do not."""
    tokenizer = tiny_tokenizer()
    same = tokenizer_fingerprint(lambda t: tokenizer(t, add_special_tokens=False)["input_ids"])
    assert TokenStore(tokenizer).tokenizer == tokenizer_fingerprint(tokenizer) == same
    assert len({same, tokenizer_fingerprint(encode), tokenizer_fingerprint(str.encode)}) == 3
