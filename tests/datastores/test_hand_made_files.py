"""Store files that somebody made by hand, and disks that take none: errors of ours that name the file."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from rasd_integrations.datastores.hidden.build import write_arrays
from rasd_integrations.datastores.hidden.store import DenseStore
from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.errors import RetrievalError, StorageError

DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
HEADERS = {
    "deep json": DEEP,
    "a list": b"[1, 2, 3]",
    "no marks": b"{}",
    "marks of numbers": b'{"__metadata__": {"format": 1}}',
    "another format": b'{"__metadata__": {"format": "x", "version": "2"}}',
    "spaces": b" " * (1 << 20),
    "reversed offsets": b'{"__metadata__": {"format": "FORMAT", "version": "2"}, '
    b'"ids": {"dtype": "U32", "shape": [2], "data_offsets": [8, 0]}}',
    "an endless shape": b'{"__metadata__": {"format": "FORMAT", "version": "2"}, '
    b'"ids": {"dtype": "U32", "shape": [100000000000000000000, 0], "data_offsets": [0, 8]}}',
    "no tensors": b'{"__metadata__": {"format": "FORMAT", "version": "2"}}',
}


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def open_tokens(path):
    return TokenStore.open(path, encode)


OPENED = {
    "rasd-token-store": open_tokens,
    "rasd-dense-store": DenseStore,
}


@pytest.mark.parametrize("kind", OPENED)
@pytest.mark.parametrize("case", HEADERS)
def test_a_store_made_by_hand_is_refused_by_name(kind, case, tmp_path):
    """Fault 32: whatever a file says, the error is ours, names the file and says what to do."""
    path = tmp_path / "made-by-hand"
    head = HEADERS[case].replace(b"FORMAT", kind.encode())
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(
        RetrievalError, match=r"made-by-hand cannot be used as a .* store.*Build it again"
    ):
        OPENED[kind](path)


@pytest.mark.parametrize("kind", OPENED)
def test_a_pipe_is_no_store(kind, tmp_path):
    """Fault 32: nothing waits for a pipe that nobody writes to."""
    path = tmp_path / "made-by-hand"
    os.mkfifo(path)
    with pytest.raises(RetrievalError, match="it is no file"):
        OPENED[kind](path)


def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch):
    """A store that cannot be written names path and size; the old one stays, and nothing half written."""
    store = TokenStore.build(["some text that is kept", "and some more of it"], encode)
    path = tmp_path / "store"
    store.save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"store: No space left.*MB are free"):
        store.save(path)
    with pytest.raises(StorageError, match="No space left"):
        write_arrays(tmp_path / "dense", {"ids": np.zeros(3, "<u4")}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["store"]
