"""Files of arrays: what is written is read, and whatever else a file says is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from damage import DAMAGE, rewrite
from safetensors import safe_open

from rasd_integrations.storage.tensor_file import (
    Content,
    FileKind,
    UnusableFileError,
    content_of,
    opened,
    write,
)

KIND = FileKind("test", "1")
ARRAYS = {
    "ids": np.arange(7, dtype=np.uint32),
    "keys": np.arange(12, dtype=np.float16).reshape(3, 4).T,
    "starts": np.arange(3, dtype=np.int64),
    "none": np.empty((0, 2), np.float32),
    "bytes": np.arange(5, dtype=np.uint8),
}


@pytest.fixture
def path(tmp_path):
    arrays = {name: content_of(array) for name, array in ARRAYS.items()}
    arrays["half"] = Content("BF16", (2, 2), lambda: np.arange(8, dtype=np.uint8))
    write(tmp_path / "file", KIND, {"mark": "ü"}, arrays)
    return tmp_path / "file"


def read(path):
    with opened(path, KIND) as file:
        file.verify()
        return file.marks["mark"], {name: file.read(name).tobytes() for name in file.entries}


def test_what_is_written_is_read(path):
    """Marks and bytes come back, wide types first so that all are aligned, and safetensors reads the file, too."""
    mark, contents = read(path)
    expected = {name: array.tobytes() for name, array in ARRAYS.items()}
    assert (mark, contents) == ("ü", expected | {"half": bytes(range(8))})
    with opened(path, KIND) as file:
        starts = {name: entry.start for name, entry in file.entries.items()}
        room = np.empty(100, np.uint8)
        assert file.read("ids", room).base is room
    assert all(starts[name] % array.itemsize == 0 for name, array in ARRAYS.items())
    with safe_open(path, "np") as tensors:
        assert all((tensors.get_tensor(name) == array).all() for name, array in ARRAYS.items())


def test_the_same_arrays_make_the_same_bytes(path, tmp_path):
    """The order in which they are given counts for nothing but among those of one width."""
    again = {name: content_of(ARRAYS[name]) for name in sorted(ARRAYS, reverse=True)}
    for name in ("one", "two"):
        write(tmp_path / name, KIND, {}, again)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_forged_file_is_refused(case, path):
    """Fault 32: whatever a file says, the error is ours and says what is wrong."""
    DAMAGE[case](path)
    with pytest.raises(UnusableFileError, match=r"it|checksum"):
        read(path)


def test_a_forgery_that_changes_nothing_is_read(path):
    """What forges files above can make a good one: each is refused for what it changes."""
    before = read(path)
    rewrite(path, lambda header, marks: None)
    assert read(path) == before


def test_a_file_changed_or_cut_anywhere_is_refused(path):
    """In the header or in the arrays, at any byte."""
    data = path.read_bytes()
    for i in range(len(data)):
        for spoiled in (data[:i], data[:i] + bytes([data[i] ^ 0x15]) + data[i + 1 :]):
            path.write_bytes(spoiled)
            with pytest.raises(UnusableFileError):
                read(path)


def test_another_kind_is_named(path):
    """The message says what the file is, and what was wanted."""
    wanted = r"it is test version 1, not other version 2"
    with pytest.raises(UnusableFileError, match=wanted), opened(path, FileKind("other", "2")):
        pass


def test_arrays_are_adjacent(path):
    """The header lists them in the order of their bytes, without gaps."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    offsets = [e["data_offsets"] for n, e in header.items() if n != "__metadata__"]
    assert offsets[0][0] == 0
    assert all(one[1] == other[0] for one, other in itertools.pairwise(offsets))
