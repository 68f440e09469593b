"""Files written in one move: what a killed writer, a full disk and a read-only folder leave behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from rasd_integrations.errors import RASDError, StorageError
from rasd_integrations.storage.atomic import clear_abandoned, replaced_file, replaced_folder

WRITER = """
import sys
from pathlib import Path
from rasd_integrations.storage.atomic import replaced_file, replaced_folder
root = Path(sys.argv[1])
print("ready", flush=True)
while True:
    for letter in b"ab":
        with replaced_file(root / "file", 1 << 20) as file:
            for _ in range(16):
                file.write(bytes([letter]) * (1 << 16))
    with replaced_folder(root / str(letter), 1 << 20) as folder:
        for name in ("one", "two"):
            (folder / name).write_bytes(b"c" * (1 << 18))
    for name in ("one", "two"):
        (root / str(letter) / name).unlink()
    (root / str(letter)).rmdir()
"""


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_killed_writer_leaves_no_half_file(tmp_path):
    """Whenever it is killed, a file is whole, and what it left is removed after an hour."""
    for delay in (0.0, 0.003, 0.01, 0.02, 0.05, 0.08):
        command = [sys.executable, "-W", "ignore", "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "ready\n"
            time.sleep(0.05 + delay)
            writer.kill()
        content = (tmp_path / "file").read_bytes()
        assert content in (b"a" * (1 << 20), b"b" * (1 << 20))
    left = [p for p in tmp_path.iterdir() if p.name.startswith(".rasd-new-")]
    clear_abandoned(tmp_path)
    assert all(path.exists() for path in left)
    for path in left:
        for part in (*path.rglob("*"), path):
            os.utime(part, (time.time() - 4000,) * 2)
    clear_abandoned(tmp_path)
    assert not any(path.exists() for path in left)


def test_a_writer_at_work_is_left_alone(tmp_path):
    """Two write to one folder at the same time, and both come to their end."""
    with replaced_file(tmp_path / "one", 1) as one:
        with replaced_file(tmp_path / "two", 1) as two:
            two.write(b"2")
        one.write(b"1")
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == [b"1", b"2"]


def test_what_others_made_is_not_cleared(tmp_path):
    """Only names that this module makes up are ever removed."""
    for name in (
        ".rasd-new-x",
        ".rasd-new-",
        ".tmp123",
        "rasd-new-0123456789abcdef",
        ".rasd-old-0123456789abcdef",
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    before = names(tmp_path)
    clear_abandoned(tmp_path)
    assert names(tmp_path) == before


def test_a_link_by_our_name_is_not_ours(tmp_path):
    """No writer makes links: it stays, and so does what it points to."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    link = tmp_path / ".rasd-new-0123456789abcdef"
    link.symlink_to(outside)
    os.utime(link, (0, 0), follow_symlinks=False)
    clear_abandoned(tmp_path)
    assert names(tmp_path) == [link.name, "outside"]
    assert names(outside) == ["file"]


def test_a_full_disk_names_path_size_and_room(tmp_path, monkeypatch):
    """The error is ours, and an OSError; nothing is left, and the old file stays."""
    path = tmp_path / "store"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(
            StorageError, match=r"store: No space left.*25\.0 MB.*MB are free.*Make room"
        ) as caught,
        replaced_file(path, 25_000_000) as file,
    ):
        file.write(b"new")
    assert isinstance(caught.value, RASDError)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["store"])


@pytest.mark.parametrize("replaced", [replaced_file, replaced_folder])
def test_a_folder_that_cannot_be_made_is_an_error_of_ours(replaced, tmp_path):
    """A path below a file has no room for a folder."""
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="choose a folder"),
        replaced(tmp_path / "file" / "new", 1),
    ):
        pass


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    """What the block raises goes on as it is."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for replaced in (replaced_file, replaced_folder):
        with pytest.raises(KeyboardInterrupt), replaced(path, 1):
            raise KeyboardInterrupt
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["file"])


def test_the_first_of_two_folders_stays(tmp_path):
    """Who comes second with the same folder leaves the first as it is, and nothing half made beside it."""
    for content in ("first", "second"):
        with replaced_folder(tmp_path / "folder", 10) as new:
            (new / "file").write_text(content)
    assert (tmp_path / "folder" / "file").read_text() == "first"
    assert names(tmp_path) == ["folder"]
