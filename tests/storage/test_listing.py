"""``rasd cache``: what is listed and cleared is ours, and nothing else is touched."""

from __future__ import annotations

import io
import os
import sys
import time

import pytest

from rasd_integrations.cli import main
from rasd_integrations.storage.marked import MARKER, made_folder, mark

FOREIGN = ("converted/mine/model.safetensors", "notes.txt", "empty/.keep")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a cache folder with three models of ours, and a user's files beside and within them."""
    monkeypatch.setenv("RASD_CACHE", str(tmp_path))
    for model, kind, size in (("big", "converted", 3_000_000), ("small", "compiled", 1_000_000)):
        with made_folder(tmp_path / kind / model, kind, model, size) as new:
            (new / "weights").write_bytes(bytes(size))
    mark(tmp_path / "kept", "kept prompts", "small")
    (tmp_path / "kept" / f"{'0a' * 16}.rasd-prefix").write_bytes(bytes(500_000))
    for name in FOREIGN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    return tmp_path


def left(root):
    """Return the models that still have files, and check that a user's files are as they were."""
    assert all((root / name).read_text() == "mine" for name in FOREIGN)
    return sorted(p.parent.name for p in root.rglob(MARKER))


def test_the_list_names_model_kind_size_and_last_use(root, capsys):
    """The largest comes first; the total, the folder and what is not ours are said once."""
    day = time.mktime((2026, 1, 2, 3, 4, 0, 0, 0, -1))
    os.utime(root / "converted" / "big" / MARKER, (day, day))
    assert main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["model", "kind", "size", "last", "used"]
    assert lines[1].split() == ["big", "converted", "3.0", "MB", "2026-01-02", "03:04"]
    assert [line.split()[:2] for line in lines[2:4]] == [["small", "compiled"], ["small", "kept"]]
    assert lines[4].split() == ["total", "4.5", "MB"]
    assert lines[6:] == [
        f"in {root}",
        "not ours, never removed: converted/mine, empty, notes.txt",
    ]


@pytest.mark.parametrize(
    ("given", "stays"),
    [
        (["small"], ["big"]),
        (["big", "small"], []),
        (["--all"], []),
        (["--older-than", "30"], ["kept", "small"]),
        (["small", "--older-than", "30"], ["big", "kept", "small"]),
        (["--all", "--older-than", "30"], ["kept", "small"]),
    ],
)
def test_what_is_chosen_is_cleared(root, given, stays, capsys):
    """Fault 17: only entries of ours go, and it is said which."""
    month = time.time() - 31 * 86400
    os.utime(root / "converted" / "big" / MARKER, (month, month))
    assert main(["cache", "clear", *given, "--yes"]) == 0
    assert left(root) == stays
    out = capsys.readouterr().out
    assert out.count("removed ") == 3 - len(stays) or out == "nothing to remove\n"
    assert ("removed big (converted): 3.0 MB" in out) == ("big" not in stays)


def test_a_users_file_in_a_folder_of_ours_keeps_the_folder(root, capsys):
    """Our files go; what was put beside them stays, and the folder is named."""
    mine = root / "compiled" / "small" / "mine"
    mine.write_text("mine")
    assert main(["cache", "clear", "small", "--yes"]) == 0
    assert f"{mine.parent} stays" in capsys.readouterr().out
    assert sorted(p.name for p in mine.parent.iterdir()) == ["mine", MARKER]


def test_a_link_by_the_name_of_a_file_of_ours_stays(root):
    """No writer of ours makes links."""
    link = root / "kept" / f"{'0b' * 16}.rasd-prefix"
    link.symlink_to(root / "notes.txt")
    assert main(["cache", "clear", "--all", "--yes"]) == 0
    assert link.is_symlink()
    assert left(root) == ["kept"]


def test_a_marker_that_names_files_elsewhere_is_not_ours(root):
    """A folder from elsewhere cannot have a user's files removed."""
    mark(
        root / "converted" / "evil",
        "converted",
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
        (["other", "--yes"], "nothing of 'other' in .*There is: big, small"),
        (["big", "--all", "--yes"], "'big' is named, too"),
        (["--all"], "Say --yes"),
    ],
)
def test_an_unclear_wish_is_refused(root, given, words, capsys, monkeypatch):
    """Nothing is removed without a selection and a yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert main(["cache", "clear", *given]) == 1
    assert left(root) == ["big", "kept", "small"]
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
    assert "big (converted): 3.0 MB" in capsys.readouterr().out


def test_another_folder_is_listed_and_an_empty_one_is_no_error(root, tmp_path, capsys):
    """``--folder`` names a ``prefix_cache_dir``; a folder that is not there holds nothing."""
    assert main(["cache", "--folder", str(tmp_path / "nowhere")]) == 0
    assert "0.0 MB" in capsys.readouterr().out
    assert main(["cache", "--folder", str(root), "clear", "--all", "--yes"]) == 0
    assert left(root) == []
