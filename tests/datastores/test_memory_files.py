"""A memory in a folder: found by later processes, whatever happened to the last one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes_memory import IdsTokenizer, Listed, drafted, new_memory, settled

from rasd_integrations.datastores.tokens.answer_log import AnswerLog
from rasd_integrations.datastores.tokens.encoding import as_ids, ids_key
from rasd_integrations.datastores.tokens.memory import Memories
from rasd_integrations.datastores.tokens.store import TokenStore
from rasd_integrations.storage.marked import marked_folders

ROWS = [as_ids([i, i + 1, i + 2]) for i in range(0, 60, 3)]


def log_of(folder: Path) -> AnswerLog:
    return AnswerLog(folder / "answers.rasd-memory", "model")


def rows_of(log: AnswerLog) -> list[list[int]]:
    return [ids.tolist() for ids in log.read()]


@pytest.fixture
def log(tmp_path) -> AnswerLog:
    log = log_of(tmp_path / "memory")
    for ids in ROWS:
        log.append(ids)
    return log


def test_what_was_appended_is_read(log):
    """In order; a missing file is empty."""
    assert rows_of(log) == [ids.tolist() for ids in ROWS]
    assert log_of(log.path.parent / "other").read() == []


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_write_that_was_cut_loses_one_answer(log, cut):
    """Wherever it was cut; what another process appended afterwards is read."""
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-cut])
    assert rows_of(log) == [ids.tolist() for ids in ROWS[:-1]]
    log.append(as_ids([7, 8]))
    assert rows_of(log) == [*(ids.tolist() for ids in ROWS[:-1]), [7, 8]]


@pytest.mark.parametrize("at", [0, 3, 4, 7, 9, 12, 20, 23])
def test_damage_loses_the_answer_it_is_in(log, at):
    """A wrong byte in any part of a record; the others are read."""
    content = bytearray(log.path.read_bytes())
    content[24 * 4 + at] ^= 0x41
    log.path.write_bytes(content)
    kept = rows_of(log)
    assert [ids.tolist() for i, ids in enumerate(ROWS) if i != 4] == kept


def test_answers_are_removed_by_key(log):
    """Also those of another process."""
    log_of(log.path.parent).append(as_ids([7, 8]))
    log.remove({ids_key(ROWS[0]), ids_key(as_ids([7, 8]))})
    assert rows_of(log) == [ids.tolist() for ids in ROWS[1:]]


def test_a_folder_that_cannot_be_written_to_costs_one_warning(tmp_path, caplog):
    """Answers are drafted from in this process all the same."""
    (tmp_path / "file").write_text("in the way")
    memory = new_memory(folder=tmp_path / "file" / "memory")
    for i in range(3):
        memory.answers.add([], [i, i + 1, i + 2])
    assert len(memory.answers.store) == 3
    assert sum("not kept" in record.message for record in caplog.records) == 1


def test_a_later_memory_has_the_answers_and_encodes_no_text_again(tmp_path):
    """By namespace and tokenizer; a collection's text is drafted from once the store is seen to hold it still."""
    encoded = []

    class Counting(IdsTokenizer):
        def __call__(self, text):
            encoded.append(text)
            return super().__call__(text)

    source = Listed(["1 2 3", "5 6 7"])
    first = Memories(Counting(), "org/model").of("tenant", tmp_path)
    first.answers.add([], [20, 21, 22])
    settled(first, source)
    del source.held["5 6 7"]
    encoded.clear()
    again = Memories(Counting(), "org/model").of("tenant", tmp_path)
    assert [ids.tolist() for _, ids in again.answers.store.rows()] == [[20, 21, 22]]
    assert drafted(again, [1, 2], source) == (3,)
    assert drafted(again, [5, 6], source) == ()
    assert "1 2 3" not in encoded
    other = Memories(Counting(), "org/model").of("another", tmp_path)
    assert len(other.answers.store) == 0
    listed = [*marked_folders(tmp_path / "memory")]
    assert [(folder.kind, folder.model) for folder in listed] == [("memory", "org/model")]
    assert listed[0].remove() > 0
    assert Memories(Counting(), "org/model").of("tenant", tmp_path).forget() == 0


@pytest.mark.parametrize("is_read", [True, False])
def test_what_is_forgotten_is_in_no_file(tmp_path, is_read):
    """Whether this process has read the collection or not."""
    source = Listed(["1 2 3", "5 6 7", "8 9 10"])
    settled(first := new_memory(folder=tmp_path), source)
    (file,) = [p for p in tmp_path.glob("*.rasd-memory") if p.name[:4] not in ("answ", "lock")]
    memory = first if is_read else new_memory(folder=tmp_path)

    def kept():
        return [ids.tolist() for _, ids in TokenStore.open(file, IdsTokenizer()).rows()]

    assert len(kept()) == 3
    memory.forget("5 6 7")
    assert sorted(kept()) == [[1, 2, 3], [8, 9, 10]]
    memory.forget()
    assert kept() == []


@pytest.mark.parametrize("content", [b"", b"rubbish" * 50])
def test_a_damaged_collection_is_read_again(tmp_path, content):
    """Nothing of it is drafted from, and no error reaches the answer."""
    source = Listed(["1 2 3"])
    settled(new_memory(folder=tmp_path), source)
    (file,) = [p for p in tmp_path.glob("*.rasd-memory") if p.name[:4] not in ("answ", "lock")]
    file.write_bytes(content)
    assert drafted(new_memory(folder=tmp_path), [1, 2], source) == (3,)


WRITER = """
import sys
from pathlib import Path
from rasd_integrations.datastores.tokens.answer_log import AnswerLog
from rasd_integrations.datastores.tokens.encoding import as_ids
log = AnswerLog(Path(sys.argv[1]) / "answers.rasd-memory", "model")
first = int(sys.argv[2])
for i in range(first, first + 100_000):
    log.append(as_ids([i, *range(200)]))
    print(i, flush=True)
"""


@pytest.mark.slow
def test_killed_writers_lose_at_most_their_last_answer(tmp_path):
    """Two processes at once on one folder, killed in mid-write, ten times."""
    said: set[int] = set()
    for turn in range(10):
        starts = [turn * 1_000_000, turn * 1_000_000 + 500_000]
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path), str(start)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for start in starts
        ]
        for writer in writers:
            assert writer.stdout is not None
            said.add(int(writer.stdout.readline()))
        time.sleep(0.05 * (turn + 1))
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
        for writer in writers:
            said |= {int(line) for line in writer.communicate()[0].split()}
    kept = {row[0] for row in rows_of(log_of(tmp_path))}
    assert said <= kept
    assert len(kept - said) <= 20
