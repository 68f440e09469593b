"""``rasd cache``: what is listed and cleared is ours, and nothing else is touched."""

from __future__ import annotations

import io
import os
import sys
import time

import pytest

from rasd_integrations.cli import main
from rasd_integrations.storage.marked import MARKER, adding_to, made_folder, mark

FOREIGN = ("models/mine/model.safetensors", "notes.txt", "empty/.keep")
ALL = ["big", "memory-key", "prefixes-key", "small"]
PREFIX, MEMORY = f"{'0a' * 16}.rasd-prefix", "answers.rasd-memory"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a cache folder with each kind of ours, of two models, and a user's files beside and within them."""
    monkeypatch.setenv("RASD_CACHE", str(tmp_path))
    for kind, model, size in (("models", "big", 3_000_000), ("graphs", "small", 1_000_000)):
        with made_folder(tmp_path / kind / model, kind, model, size) as new:
            (new / "weights").write_bytes(bytes(size))
    for kind, name in (("prefixes", PREFIX), ("memory", MEMORY)):
        with adding_to(tmp_path / kind / f"{kind}-key", kind, "small"):
            (tmp_path / kind / f"{kind}-key" / name).write_bytes(bytes(500_000))
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    return tmp_path


def left(root):
    """Return the models that still have files, and check that a user's files are as they were."""
    assert all((root / name).read_text() == "mine" for name in FOREIGN)
    return sorted(p.parent.name for p in root.rglob(MARKER))


def test_the_list_names_model_kind_size_and_last_use(root, capsys):
    """By kind, and in a kind the largest first; the total, the folder and what is not ours are said once."""
    day = time.mktime((2026, 1, 2, 3, 4, 0, 0, 0, -1))
    os.utime(root / "models" / "big" / MARKER, (day, day))
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "model", "size", "last", "used"]
    assert lines[1].split() == ["models", "big", "3.0", "MB", "2026-01-02", "03:04"]
    rest = [["graphs", "small"], ["prefixes", "small"], ["memory", "small"]]
    assert [line.split()[:2] for line in lines[2:5]] == rest
    assert lines[5].split() == ["total", "5.0", "MB"]
    assert lines[7:] == [f"in {root}", "not ours, never removed: empty, models/mine, notes.txt"]


@pytest.mark.parametrize(
    ("given", "stays"),
    [
        (["small"], ["big"]),
        (["big", "small"], []),
        (["models"], ["memory-key", "prefixes-key", "small"]),
        (["graphs"], ["big", "memory-key", "prefixes-key"]),
        (["prefixes"], ["big", "memory-key", "small"]),
        (["memory"], ["big", "prefixes-key", "small"]),
        (["graphs", "memory"], ["big", "prefixes-key"]),
        (["memory", "small"], ["big", "prefixes-key", "small"]),
        (["memory", "big"], ALL),
        (["digests"], ALL),
        (["--all"], []),
        (["--older-than", "30"], ["memory-key", "prefixes-key", "small"]),
        (["small", "--older-than", "30"], ALL),
        (["--all", "--older-than", "30"], ["memory-key", "prefixes-key", "small"]),
    ],
)
def test_what_is_chosen_is_cleared(root, given, stays, capsys):
    """Fault 17: only entries of ours go, and it is said which."""
    month = time.time() - 31 * 86400
    os.utime(root / "models" / "big" / MARKER, (month, month))
    assert main(["cache", "clear", *given, "--yes"]) == 0
    assert left(root) == stays
    out = capsys.readouterr().out
    assert out.count("removed ") == 4 - len(stays) or out == "nothing to remove\n"
    assert ("removed big (models): 3.0 MB" in out) == ("big" not in stays)


def test_a_users_file_in_a_folder_of_ours_keeps_the_folder(root, capsys):
    """Our files go; what was put beside them stays, and the folder is named."""
    mine = root / "graphs" / "small" / "mine"
    mine.write_text("mine")
    assert main(["cache", "clear", "small", "--yes"]) == 0
    assert f"{mine.parent} stays" in capsys.readouterr().out
    assert sorted(p.name for p in mine.parent.iterdir()) == ["mine", MARKER]


def test_a_link_by_the_name_of_a_file_of_ours_stays(root):
    """No writer of ours makes links."""
    link = root / "prefixes" / "prefixes-key" / f"{'0b' * 16}.rasd-prefix"
    link.symlink_to(root / "notes.txt")
    assert main(["cache", "clear", "--all", "--yes"]) == 0
    assert link.is_symlink()
    assert left(root) == ["prefixes-key"]


def test_a_marker_that_names_files_elsewhere_is_not_ours(root):
    """A folder from elsewhere cannot have a user's files removed."""
    mark(
        root / "models" / "evil",
        "models",
        "evil",
        ["../../notes.txt", str(root / "notes.txt")],
    )
    assert main(["cache", "clear", "--all", "--yes"]) == 0
    assert left(root) == ["evil"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "Nothing is named"),
        (["--yes"], "Nothing is named"),
        (["other", "--yes"], "nothing of 'other' in .*Kinds are models, .*there: big, small"),
        (["big", "--all", "--yes"], "'big' is named, too"),
        (["--all"], "Say --yes"),
    ],
)
def test_an_unclear_wish_is_refused(root, given, words, capsys, monkeypatch):
    """Nothing is removed without a selection and a yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(["cache", "clear", *given]) == 1
    assert left(root) == ALL
    import re

    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("answer", ["y", "n", ""])
def test_a_terminal_is_asked(root, answer, monkeypatch, capsys):
    """Anything but yes removes nothing."""
    stdin = io.StringIO(f"{answer}\n")
    stdin.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["cache", "clear", "big"]) == (answer != "y")
    assert ("big" in left(root)) == (answer != "y")
    assert "big (models): 3.0 MB" in capsys.readouterr().out


def test_another_folder_is_listed_and_an_empty_one_is_no_error(root, tmp_path, capsys):
    """``--dir`` names a ``cache_dir``; a folder that is not there holds nothing."""
    assert main(["cache", "--dir", str(tmp_path / "nowhere")]) == 0
    assert "0.0 MB" in capsys.readouterr().out
    assert main(["cache", "--dir", str(root), "clear", "--all", "--yes"]) == 0
    assert left(root) == []


def test_folders_of_earlier_versions_are_listed_and_cleared(root, capsys):
    """What is not read any more does not stay for ever: one kind, wherever it lay, as large as it is."""
    for kind, where in (
        ("converted", "gguf/a"),
        ("joined", "packaged/b"),
        ("compiled", "compiled/c"),
    ):
        with made_folder(root / where, kind, "old", 0) as new:
            (new / "file").write_bytes(bytes(1_000_000))
    mark(root / "0123", "kept prompts", "old")
    (root / "0123" / PREFIX).write_bytes(bytes(1_000_000))
    (root / "0123" / "mine.rasd-prefix").write_text("mine")
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.count("earlier   old") == 4
    assert main(["cache", "clear", "earlier", "--yes"]) == 0
    assert left(root) == ["0123", *ALL]
    assert [p.name for p in (root / "0123").iterdir() if p.name != MARKER] == ["mine.rasd-prefix"]
    assert "4.0 MB are free now" in capsys.readouterr().out


def test_a_folder_that_is_cleared_while_a_file_is_added_is_ours_again(root):
    """Two processes: no file of ours is left without a marker, where no list would name it."""
    folder = root / "prefixes" / "prefixes-key"
    with adding_to(folder, "prefixes", "small"):
        assert main(["cache", "clear", "prefixes", "--yes"]) == 0
        assert not folder.exists()
        folder.mkdir()
        (folder / PREFIX).write_bytes(b"1")
    assert left(root) == ALL
