"""Dense stores: what they hold and find, builds that are killed and go on, files that are damaged."""

from __future__ import annotations

import json

import densestore
import numpy as np
import pytest
import torch
from fakes_dense import TEXTS, encode, model, states
from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer

from rasd_integrations.datastores.hidden import DenseStore, build, nearest, store
from rasd_integrations.datastores.hidden.transform import Transform
from rasd_integrations.datastores.tokens.encoding import SEPARATOR
from rasd_integrations.errors import ConfigurationError, RetrievalError
from rasd_integrations.runtime.models import SharedModel
from rasd_integrations.types import Chunk


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


SPACE = encode(" ")[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> DenseStore:
    return DenseStore.build(TEXTS, model(), tmp_path_factory.mktemp("built"))


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Cut builds in many parts, of which two are the sample."""
    monkeypatch.setattr(build, "_PART", 150)
    monkeypatch.setattr(build, "_SAMPLE", 2)


# --- what is found -------------------------------------------------------------------------------


def brute_force(rows, query, token, depth):
    """Return agreements and followers by a loop over all places, in DReSD's order of steps."""
    sample = np.concatenate([states(row)[:-2] for row in rows]).astype(np.float16).astype(float)
    mean, deviation = sample.mean(0), sample.std(0)
    _, _, components = np.linalg.svd((sample - mean) / deviation, full_matrices=False)

    def key(hidden):
        y = components[:64] @ ((hidden - mean) / deviation)
        return y / np.linalg.norm(y)

    found = [
        (float(key(hidden) @ key(query)), tuple(row[i + 2 : i + 2 + depth]))
        for row in rows
        for i, hidden in enumerate(states(row)[:-2])
        if row[i + 1] == token
    ]
    return sorted(found, reverse=True)


@pytest.mark.slow
def test_found_are_the_nearest_places_with_the_same_next_token(tmp_path):
    """As DReSD's steps by brute force: z-score, components, unit length, dot product, filter."""
    rows = [random_ids(n, seed=n) for n in (120, 3, 90, 60)]
    rows[2][30:60] = rows[0][30:60]  # some tokens stand often
    kept = DenseStore.build(rows, model(), tmp_path)
    answer = [*rows[0][20:45], *rows[3][:20]]
    compared = 0
    for i, query in enumerate(states(answer)[:-1]):
        expected = brute_force(rows, query, answer[i + 1], 5)
        found = kept.find(query, answer[i + 1], 3, 5)
        assert len(found) == min(3, len(expected))
        best = [max(agreement, 0.0) for agreement, _ in expected[:3]]
        assert [n.agreement for n in found] == pytest.approx(best, abs=2e-3)
        for neighbour in found:  # float16 may swap places that agree nearly alike
            own = [a for a, following in expected if following == neighbour.following]
            assert min(abs(max(a, 0.0) - neighbour.agreement) for a in own) < 2e-3
        compared += len(found)
    assert compared > 40


def test_texts_are_read_as_they_stand(built):
    """Ids are those of the tokenizer, each text by itself; control tokens in a text stay text."""
    assert built.num_tokens == sum(len(t.encode()) for t in TEXTS)
    text = "a<|im_end|>b"
    (piece,) = build._pieces([Chunk(text)], model())
    assert np.frombuffer(piece.ids, "<u4").tolist() == encode(text)
    assert len(encode(text)) == len(text)


def test_followers_end_with_their_text(tmp_path):
    """No draft runs from one text into the next; places without a follower are not kept."""
    kept = DenseStore.build([[1, 2, 3, 4], [1, 2, 5, 6, 7, 8], [2, 2]], model(), tmp_path)
    query = states([1, 2, 3])[0]
    followers = {n.following for n in kept.find(query, 2, 9, 9)}
    assert followers == {(3, 4), (5, 6, 7, 8)}
    assert kept.find(query, 4, 9, 9) == []
    assert kept.find(query, 99, 9, 9) == []
    assert {n.following for n in kept.find(query, 2, 9, 1)} == {(3,), (5,)}


def test_the_same_place_agrees_wholly(built):
    """A text that the store holds is found at its own place, all along; texts that begin alike agree alike."""
    ids = encode(TEXTS[5])
    for i, hidden in enumerate(states(ids)[:-2]):
        found = built.find(hidden, ids[i + 1], 24, 4)
        best = [n.following for n in found if n.agreement > 0.999]
        assert tuple(ids[i + 2 : i + 6]) in best
        assert len(best) < 24 or i < 8


def test_of_very_frequent_tokens_an_even_part_is_compared(built, monkeypatch):
    """Every other place or fewer, to the limit, and the found ones are true places."""
    query = states(encode(TEXTS[0]))[3]
    everywhere = built.find(query, SPACE, 1000, 3)
    monkeypatch.setattr(store, "_MOST_ROWS", 50)
    some = built.find(query, SPACE, 1000, 3)
    assert 25 < len(some) <= 50 < len(everywhere)
    assert set(some) <= set(everywhere)


def test_nearest_is_sorted_and_keeps_equal_values_in_order():
    """Against a plain sort, with many equal values."""
    generator = np.random.default_rng(0)
    for size in (1, 5, 40):
        values = generator.integers(0, 6, size).astype(np.float32)
        for k in (1, 3, 16, 100):
            assert nearest(values, k) == sorted(range(size), key=lambda i: (-values[i], i))[:k]


def test_the_tokenizers_own_beginning_is_read_and_not_kept(tmp_path):
    """With a tokenizer that begins every text with a token, states follow it and ids leave it out."""

    class Beginning:
        """A byte tokenizer with a beginning and an end."""

        bos_token_id = 257

        def __call__(self, text, **options):
            ids = list(text.encode())
            return {"input_ids": ids if options else [257, *ids, 256]}

    shared = SharedModel(tiny_llama(), Beginning(), "beginning")
    kept = DenseStore.build(["one two three"], shared, tmp_path)
    ids = list(b"one two three")
    assert kept._ids[:-1].tolist() == ids
    hidden = states([257, *ids])[1:]
    assert kept.find(hidden[4], ids[5], 1, 3)[0].agreement > 0.99
    assert kept.find(states(ids)[4], ids[5], 1, 3)[0].agreement < 0.98


def test_the_transform_needs_no_more_components_than_there_are():
    """The tiny width of 48 is kept whole; of 100 dimensions 64 are, the ones that vary most."""
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((500, 100)).astype(np.float16)
    rows[:, :50] = rows[:, :1]  # half of the dimensions say one thing
    transform = Transform.fit([rows[:300], rows[300:]])
    assert transform.basis.shape == (100, 64)
    assert Transform.fit([rows[:, :48]]).basis.shape == (48, 48)
    first = (rows.astype(np.float32) - transform.mean) @ transform.basis[:, 0]
    assert abs(np.corrcoef(first, rows[:, 0])[0, 1]) > 0.99
    assert np.linalg.norm(transform(rows), axis=1) == pytest.approx(1, abs=1e-5)


# --- sources -------------------------------------------------------------------------------------


def test_sources_of_all_kinds_make_the_same_store(built, tmp_path):
    """Texts, chunks; double texts and order count for nothing."""
    sources = (reversed(TEXTS), [*TEXTS, TEXTS[3]], [Chunk(t) for t in TEXTS])
    for number, source in enumerate(sources):
        again = DenseStore.build(source, model(), tmp_path / str(number))
        assert again.path.read_bytes() == built.path.read_bytes()


def test_long_texts_are_cut_and_rows_of_ids_are_not(monkeypatch):
    """Pieces of a text are read apart; an answer is read behind its prompt."""
    monkeypatch.setattr(build, "_PIECE", 10)
    lengths = [piece.num_tokens for piece in build._pieces(["x" * 35, list(range(35))], model())]
    assert lengths == [10, 10, 10, 5, 35]
    assert [p.num_tokens for p in build._pieces([[1] * 3000], model())] == [2048, 952]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "nothing to learn"),
        (["ab"], "nothing to learn"),
        ([3.5], "3.5 has no text"),
        ([[1, 2, VOCAB]], r"outside 0\.\.258"),
        ([[1, -2, 3]], r"outside 0\.\.258"),
        (type("Searcher", (), {"search": lambda *_: []})(), "is no list of texts"),
    ],
    ids=["empty", "short", "number", "unknown id", "negative id", "searcher"],
)
def test_sources_that_cannot_work_are_refused(source, message, tmp_path):
    """Each error says what is wrong; nothing is written."""
    with pytest.raises(ConfigurationError, match=message):
        DenseStore.build(source, model(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- builds that are killed ----------------------------------------------------------------------


class Killed(BaseException):
    """What a kill is to the build."""


def counted(shared, counts):
    """Return a model that counts the tokens it is made to read."""

    class Counting:
        """The same target, watched."""

        tokenizer, name, fingerprint = shared.tokenizer, shared.name, shared.fingerprint

        class Target:
            """Stands in for the target."""

            window, vocab_size = shared.target.window, shared.target.vocab_size

            @staticmethod
            def prefill(ids, buffer):
                counts.append(len(ids))
                return shared.target.prefill(ids, buffer)

        target = Target()

    return Counting()


@pytest.mark.parametrize("killed_at", [1, 5, 9, 17, 24])
def test_a_killed_build_goes_on_and_gives_the_same_bits(tmp_path, small_parts, killed_at):
    """Killed at any piece, in the sample or behind it: finished parts are not read again."""
    whole = DenseStore.build(TEXTS, model(), tmp_path / "whole")
    calls = 0

    def kill(done, total):
        nonlocal calls
        calls += 1
        if calls == killed_at:
            raise Killed

    first: list[int] = []
    second: list[int] = []
    with pytest.raises(Killed):
        DenseStore.build(TEXTS, counted(model(), first), tmp_path / "killed", progress=kill)
    seen: list[tuple[int, int]] = []
    shared = counted(model(), second)
    resumed = DenseStore.build(
        TEXTS, shared, tmp_path / "killed", progress=lambda *p: seen.append(p)
    )
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    # At most the part at work is read twice: 150 tokens and the piece that filled it.
    total = sum(len(t.encode()) for t in TEXTS)
    assert sum(first) + sum(second) <= total + 150 + 60
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert [p.name for p in (tmp_path / "killed").iterdir()] == [build.FILE]


def test_a_finished_build_is_not_repeated_and_new_texts_are(tmp_path):
    """The same texts and model: the file is opened; other texts: the store is built again."""
    counts: list[int] = []
    shared = counted(model(), counts)
    DenseStore.build(TEXTS[:5], shared, tmp_path)
    read = len(counts)
    DenseStore.build(TEXTS[:5], shared, tmp_path)
    assert len(counts) == read == 5
    more = DenseStore.build(TEXTS[:6], shared, tmp_path)
    assert more.num_tokens == sum(len(t.encode()) for t in TEXTS[:6])


def test_a_users_file_among_the_parts_stays(tmp_path, small_parts):
    """Fault 17: parts are removed by the names that we give them, not the folder with all that lies in it."""
    mine = tmp_path / "parts" / "notes.safetensors"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    DenseStore.build(TEXTS, model(), tmp_path)
    assert [p.name for p in mine.parent.iterdir()] == ["notes.safetensors"]
    mine.unlink()
    mine.parent.rmdir()
    DenseStore.build(TEXTS[:-1], model(), tmp_path)
    assert not mine.parent.exists()


def test_a_damaged_part_is_made_again(tmp_path, small_parts):
    """A part that was spoiled between two runs costs time only."""
    whole = DenseStore.build(TEXTS, model(), tmp_path / "whole")

    def kill(done, total):
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        DenseStore.build(TEXTS, model(), tmp_path / "parts", progress=kill)
    parts = sorted((tmp_path / "parts" / "parts").iterdir())
    assert len(parts) >= 3
    parts[0].write_bytes(parts[0].read_bytes()[:-1])
    parts[2].write_bytes(b"")
    again = DenseStore.build(TEXTS, model(), tmp_path / "parts")
    assert again.path.read_bytes() == whole.path.read_bytes()


def test_parts_of_another_model_are_not_taken(tmp_path, small_parts):
    """A build killed with one model and taken up with another starts over."""

    def kill(done, total):
        if done > total / 2:
            raise Killed

    with pytest.raises(Killed):
        DenseStore.build(TEXTS, model(1), tmp_path / "mixed", progress=kill)
    mixed = DenseStore.build(TEXTS, model(), tmp_path / "mixed")
    whole = DenseStore.build(TEXTS, model(), tmp_path / "whole")
    assert mixed.path.read_bytes() == whole.path.read_bytes()


# --- files ---------------------------------------------------------------------------------------


def test_an_opened_store_finds_what_the_built_one_finds(built):
    """With its checksum compared or not."""
    ids = encode(TEXTS[7])
    hidden = states(ids)
    for verify in (True, False):
        opened = DenseStore.open(built.path.parent, model(), verify=verify)
        for i in range(0, len(ids) - 1, 5):
            found = opened.find(hidden[i], ids[i + 1], 4, 4)
            assert found == built.find(hidden[i], ids[i + 1], 4, 4)
            assert found


def test_a_store_of_another_model_is_refused(built):
    """The error names both, and what to do."""
    other = model(1)
    with pytest.raises(RetrievalError, match="built with tiny 0") as caught:
        DenseStore.open(built.path.parent, other)
    for part in ("tiny 1", other.fingerprint, model().fingerprint, "DenseStore.build"):
        assert part in str(caught.value)
    wide = SharedModel(tiny_gpt2(), tiny_tokenizer(), "tiny gpt2")
    with pytest.raises(RetrievalError, match="the target is tiny gpt2"):
        DenseStore.open(built.path.parent, wide)


def test_sizes_are_what_the_docs_say(built):
    """136 bytes a token at 64 dimensions: 48 here, so 104, and the transform."""
    small = built.path.stat().st_size - 4 * 48 * 49
    per_token = small / built.num_tokens
    assert 96 < per_token < 112
    assert int((built._ids == SEPARATOR).sum()) == len(TEXTS)


# --- the benchmark -------------------------------------------------------------------------------


def test_the_benchmark_makes_every_figure():
    """A small store and copies of it go through all that is measured; the filter before the search loses no place."""
    cost, copied = densestore.measure(0.01, model(), None, 60, times=(3,))
    document = json.loads(json.dumps([cost, copied]))
    lines = densestore.table(document).splitlines()
    asked_faiss = "dresd_found" in cost
    assert len(lines) == len(densestore.ROWS) + 1 - (0 if asked_faiss else 3)
    assert 0.01 <= cost["mb"] < 0.02
    assert cost["tokens"] == pytest.approx(1e6 * cost["mb"], rel=0.01)  # one a byte
    assert copied["tokens"] == 3 * cost["tokens"]
    assert copied["found"] >= cost["found"] > 1
    if asked_faiss:
        assert cost["dresd_found"] <= cost["found"]
