"""Stores on disk: saved and opened, damaged, replaced, mapped; and readers beside writers."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from fakes_datastore import encode, look_up, store_of
from safetensors import safe_open
from tiny import tiny_tokenizer

from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.datastores.tokens import store as store_module
from rasd_integrations.datastores.tokens.shard import continuations
from rasd_integrations.errors import RetrievalError


@pytest.fixture
def small_shards(monkeypatch):
    """Keep even tiny shards apart, so that a few texts make several."""
    monkeypatch.setattr(store_module, "_LEAST_KEPT", 1)


SENTENCES = [f"sentence {i} of a text about {'abcdefgh'[i % 8] * 5}" for i in range(60)]


@pytest.fixture
def saved(tmp_path, small_shards):
    """Return a file of a store with several shards and removed texts, and that store."""
    store = store_of(SENTENCES[:50])
    store.add(SENTENCES[50:])
    assert len(store.shards) == 2
    store.remove(SENTENCES[3:8])
    store.save(tmp_path / "deep" / "texts.rest")
    return tmp_path / "deep" / "texts.rest", store


def test_an_opened_store_is_the_saved_one(saved):
    """Texts, counts and look-ups are the same, and it goes on growing and shrinking."""
    path, store = saved
    opened = TokenStore.open(path, encode)
    assert (
        (len(opened), opened.num_tokens) == (len(store), store.num_tokens) == (55, store.num_tokens)
    )
    for context in ("a text about ", "sentence 1", "sentence 4 of", "no such thing"):
        assert look_up(opened, context) == look_up(store, context)
    assert opened.add([*SENTENCES, "something new"]) == 6
    assert opened.remove(SENTENCES[0]) == 1
    opened.save(path)
    assert len(TokenStore.open(path, encode)) == 60


def test_the_file_is_a_safetensors_file_without_removed_text(saved):
    """Others can read it, and what was removed is not in it."""
    path, _ = saved
    with safe_open(path, "np") as tensors:
        text = b"".join(tensors.get_tensor(f"{i}.text").tobytes() for i in range(2))
    held = text.decode("utf-32-be", "replace")
    assert SENTENCES[9][::-1] in held
    assert SENTENCES[4][::-1] not in held


def test_an_empty_store_can_be_saved_and_opened(tmp_path):
    """No text at all is a valid store."""
    store_of([]).save(tmp_path / "empty")
    assert len(TokenStore.open(tmp_path / "empty", encode)) == 0


def test_a_store_of_another_tokenizer_is_refused(saved):
    """Ids mean nothing to a model that numbers its tokens otherwise."""
    path, _ = saved
    with pytest.raises(RetrievalError, match="of another tokenizer"):
        TokenStore.open(path, tiny_tokenizer())


def test_a_saved_file_has_the_rights_of_any_new_file(saved, tmp_path):
    """A store that one process built can be opened by those that may read the folder's other files."""
    path, _ = saved
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_opened_store_is_mapped_not_loaded(tmp_path):
    """Opening 16 MB and looking a hundred contexts up takes hardly any memory of the process' own."""
    generator = np.random.default_rng(0)
    store = TokenStore(encode)
    store.add_ids(np.array_split(generator.integers(0, 40_000, 2_000_000), 8000))
    path = tmp_path / "large"
    store.save(path)
    del store
    assert path.stat().st_size > 15e6

    def own_memory() -> int:
        """Return the bytes that are no pages of a file, which the system may drop at any time."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("RssAnon:")[2].split()[0]) * 1024

    TokenStore.open(path, encode)  # what opening takes for good: code, buffers
    before = own_memory()
    opened = TokenStore.open(path, encode)
    for token in range(100):
        length, _ = continuations(opened.shards, [token], min_match=1, most_rows=99, depth=9)
        assert length == 1
    assert own_memory() - before < 2e6


# --- readers beside writers ----------------------------------------------------------------------


@pytest.mark.slow
def test_readers_see_whole_states_while_writers_work(small_shards):
    """Every row read during growth, removal and merging is how a text that was added goes on."""
    texts = [f"{c}{i:03} is how text {i:03} goes on" for i in range(200) for c in "xy"]
    store = store_of(texts[:20])
    done = threading.Event()
    failures: list[str] = []

    def read():
        while not done.is_set():
            for i in range(0, 200, 7):
                _, found = look_up(store, f"{i:03} is how", min_match=10, depth=12)
                if not set(found) <= {f" text {i:03} go"}:
                    failures.append(f"{i}: {found}")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(20, 400, 20):
        store.add(texts[i : i + 20])
        store.remove(texts[i - 10 : i])
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert len(store) == 400 - 19 * 10


def test_writers_do_not_lose_one_another(small_shards):
    """Texts added by several threads at once are all there, once each."""
    store = store_of([])
    texts = [f"text number {i:03}" for i in range(120)]
    writers = [
        threading.Thread(target=store.add, args=(texts[i::3] + texts[:10],)) for i in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(store) == 120
    assert look_up(store, "number 00")[1].total() == 10
