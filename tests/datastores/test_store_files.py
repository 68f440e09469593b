"""Both kinds of store files: what is wrong with one is an error of ours that names it and says what to do."""

from __future__ import annotations

import errno
import os

import pytest
from damage import DAMAGE
from fakes_datastore import encode
from fakes_dense import TEXTS, model, states
from fakes_dense import encode as ids_of

from rasd_integrations.datastores.hidden import DenseStore
from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.errors import RetrievalError, StorageError

QUERY = ids_of(TEXTS[0])[:4]


def save_tokens(folder, texts):
    TokenStore.build(texts, encode).save(folder / "store.safetensors")


def ask_tokens(store):
    return [text in store for text in TEXTS[:6]]


def ask_dense(store):
    return store.find(states(QUERY)[2], QUERY[3], 5, 5)


KINDS = {
    "token store": (save_tokens, lambda f: TokenStore.open(f / "store.safetensors", encode), ask_tokens),
    "dense store": (
        lambda f, texts: DenseStore.build(texts, model(), f), lambda f: DenseStore.open(f, model()), ask_dense,
    ),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """Return a folder with a store of this kind, its title, and how one is saved, opened and asked."""
    save, open_store, ask = KINDS[request.param]
    save(tmp_path, TEXTS[:4])
    return tmp_path, request.param, save, open_store, ask


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_forged_store_is_refused_by_name(kind, case):
    """Fault 32: the error names the file and says what to do."""
    folder, title, _, open_store, _ = kind
    DAMAGE[case](folder / "store.safetensors")
    with pytest.raises(
        RetrievalError,
        match=rf"store.safetensors cannot be used as a {title}: .* Build it again",
    ):
        open_store(folder)


def test_a_missing_store_says_how_to_make_one(kind):
    """The next step is in the error, for a folder of that name, too."""
    folder, title, _, open_store, _ = kind
    path = folder / "store.safetensors"
    for replace in (path.unlink, path.mkdir):
        replace()
        with pytest.raises(
            RetrievalError, match=rf"no {title} at .*(TokenStore|DenseStore)\.build"
        ):
            open_store(folder)


def test_a_replaced_store_leaves_open_ones_as_they_are(kind):
    """Readers of the old file go on with it."""
    folder, _, save, open_store, ask = kind
    old = open_store(folder)
    before = ask(old)
    save(folder, TEXTS[2:6])
    assert ask(old) == before
    assert ask(open_store(folder)) != before


@pytest.mark.parametrize("change", ["cut", "overwritten"])
def test_a_store_changed_in_place_is_reported_not_read(kind, change):
    """A mapped file that was cut would end the process if it were read; it is an error instead."""
    folder, title, _, open_store, ask = kind
    store, path = open_store(folder), folder / "store.safetensors"
    if change == "cut":
        os.truncate(path, 100)
    else:
        os.utime(path, ns=(1, 1))  # the clock of file times may be coarser than this test is fast
    with pytest.raises(RetrievalError, match=rf"The {title} .* was changed in place"):
        ask(store)


def test_a_full_disk_is_an_error_of_ours(kind, monkeypatch):
    """The error names path and size; the old store stays, and nothing half written."""
    folder, _, save, _, _ = kind
    before = (folder / "store.safetensors").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"No space left.*MB are free"):
        save(folder, TEXTS[4:])
    assert (folder / "store.safetensors").read_bytes() == before
    assert [p.name for p in folder.rglob("*") if p.is_file()] == ["store.safetensors"]
