"""Prefixes kept between processes: what is found again, what is refused, and what a bad disk may not do."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import DAMAGE, rewrite
from fakes import ScriptedDrafter
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_llama

from rasd_integrations.config import SamplingParams
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.base import Needs
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.engine.kv import prefix_format
from rasd_integrations.engine.kv.order import Order
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.kv.prefix_files import PrefixFiles
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.loading.identity import model_identity
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft, DraftContext

PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
PLENTY = 1 << 40
HERE = Path(__file__)


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


DOCUMENT, OTHER, THIRD = (random_ids(120, seed=s) for s in (1, 21, 22))
QUESTION = random_ids(12, seed=2)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


def cache_of(
    folder: Path, target: TargetModel, max_bytes: int = PLENTY, memory: int = 1 << 30
) -> PrefixCache:
    """Return a cache as a process that has just started has it."""
    return PrefixCache(memory, files_of(folder, target, max_bytes))


def files_of(
    folder: Path, target: TargetModel, max_bytes: int = PLENTY, *, order=Order.COLUMNS
) -> PrefixFiles:
    identity = model_identity(target.model).kv
    assert identity is not None
    layout = replace(target.layout, order=order)
    return PrefixFiles(folder, lambda: identity, layout, max_bytes, target.device)


def warm(
    target: TargetModel, cache: PrefixCache, ids: list[int], namespace: str = "", drafter=None
) -> None:
    for _ in SpeculativeDecoder(target, drafter, prefix_cache=cache).prefill(
        ids, namespace=namespace
    ):
        pass


def ask(
    target: TargetModel, cache: PrefixCache, ids: list[int], namespace: str = ""
) -> tuple[list[int], int]:
    """Return the answer's ids and how many tokens of the prompt were there."""
    stats = DecodingStats()
    decoder = SpeculativeDecoder(target, prefix_cache=cache)
    blocks = decoder.generate(ids, PARAMS, stats=stats, namespace=namespace)
    return [t for b in blocks for t in b.token_ids], stats.cached_prompt_tokens


def cold(target: TargetModel, ids: list[int]) -> list[int]:
    return ask(target, PrefixCache(0), ids)[0]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.rasd-prefix"))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# --- found again ---


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "gpt2"])
def test_a_fresh_cache_finds_what_was_warmed(family, tmp_path):
    """After a restart the document is read from disk and the answer is the cold one."""
    target = TargetModel(FAMILIES[family]())
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    answer, cached = ask(target, cache_of(tmp_path, target), DOCUMENT + QUESTION)
    assert (answer, cached) == (cold(target, DOCUMENT + QUESTION), len(DOCUMENT))


def test_rows_come_back_bit_for_bit(target, tmp_path):
    """Keys and values from disk are those that were written."""
    cache = cache_of(tmp_path, target)
    warm(target, cache, DOCUMENT)
    mine = cache.lease([*DOCUMENT, 0], 200).buffer
    theirs = cache_of(tmp_path, target).lease([*DOCUMENT, 0], 200).buffer
    for layer in range(2):
        for a, b in zip(mine.rows(layer, 0, 120), theirs.rows(layer, 0, 120), strict=True):
            assert torch.equal(a, b)
    assert (theirs.length, theirs.num_layers) == (120, 2)


@pytest.mark.parametrize("order", Order)
def test_keys_are_laid_as_they_will_be_read(order, target, tmp_path):
    """Rows from disk need not be laid again by who reads them."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    buffer = files_of(tmp_path, target, order=order).load(np.asarray(DOCUMENT), "", 200)
    memory = buffer.memory
    assert memory.is_contiguous() == (order is not Order.COLUMNS)
    buffer.lay(order)
    assert buffer.memory is memory
    fresh = cache_of(tmp_path, target).lease([*DOCUMENT, 1], 200).buffer
    for layer in range(buffer.num_layers):
        for rows, wanted in zip(buffer.rows(layer, 0, 120), fresh.rows(layer, 0, 120), strict=True):
            assert torch.equal(rows, wanted)


@pytest.mark.gpu
def test_a_gpu_finds_what_it_warmed(tmp_path, caplog):
    """Rows lie otherwise there, and files of a CPU are not taken."""
    on_cpu, on_gpu = TargetModel(tiny_llama()), TargetModel(tiny_llama().cuda())
    warm(on_cpu, cache_of(tmp_path, on_cpu), OTHER)
    warm(on_gpu, cache_of(tmp_path, on_gpu), DOCUMENT)
    answer, cached = ask(on_gpu, cache_of(tmp_path, on_gpu), DOCUMENT + QUESTION)
    assert (answer, cached) == (cold(on_gpu, DOCUMENT + QUESTION), len(DOCUMENT))
    assert ask(on_gpu, cache_of(tmp_path, on_gpu), OTHER + QUESTION)[1] == 0
    assert warnings_of(caplog) == []


def test_a_part_of_a_file_is_reused(target, tmp_path):
    """A prompt that shares the first half of a document reads as many rows."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    ids = DOCUMENT[:60] + QUESTION
    assert ask(target, cache_of(tmp_path, target), ids) == (cold(target, ids), 60)


def test_the_longest_file_is_read(target, tmp_path):
    """Of several files with a common head the longest match counts, of equal ones the shortest file."""
    cache = cache_of(tmp_path, target)
    for ids in (DOCUMENT[:40], DOCUMENT + OTHER, DOCUMENT):
        cache.clear()
        warm(target, cache, ids)
    read, fresh = [], cache_of(tmp_path, target)
    assert len(files(tmp_path)) == 2  # the third is the head of the second
    original = prefix_format.read

    def spy(path, *args, **kwargs):
        read.append(path.stat().st_size)
        return original(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_format, "read", spy)
        assert ask(target, fresh, DOCUMENT + QUESTION)[1] == 120
        assert ask(target, cache_of(tmp_path, target), DOCUMENT[:40] + QUESTION)[1] == 40
    small, large = sorted(path.stat().st_size for path in files(tmp_path))
    assert read == [large, small]


def test_a_short_common_head_does_not_read_a_long_file(target, tmp_path):
    """What all prompts begin with is prefilled: the file would be sixteen times as long."""
    ids = random_ids(400, seed=5)
    warm(target, cache_of(tmp_path, target), ids)
    assert ask(target, cache_of(tmp_path, target), ids[:24] + QUESTION)[1] == 0
    assert ask(target, cache_of(tmp_path, target), ids[:25] + QUESTION)[1] == 25


def test_memory_goes_first_where_it_holds_as_much(target, tmp_path, monkeypatch):
    """A second question does not read the file again."""
    cache = cache_of(tmp_path, target)
    warm(target, cache, DOCUMENT)
    monkeypatch.setattr(prefix_format, "read", None)
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120


def test_disk_works_without_memory(target, tmp_path):
    """A cache that keeps nothing in memory still writes and reads files."""
    warm(target, cache_of(tmp_path, target, memory=0), DOCUMENT)
    assert ask(target, cache_of(tmp_path, target, memory=0), DOCUMENT + QUESTION)[1] == 120


def test_a_known_document_is_neither_prefilled_nor_written_again(target, tmp_path, monkeypatch):
    """Warming it a second time, in a later process, runs no token."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    (path,) = files(tmp_path)
    inode = path.stat().st_ino
    later, latest = (cache_of(tmp_path, target) for _ in range(2))
    run = []
    original = TargetModel.prefill
    monkeypatch.setattr(
        TargetModel,
        "prefill",
        lambda self, ids, buffer, **how: run.extend(ids) or original(self, ids, buffer, **how),
    )
    warm(target, later, DOCUMENT)
    assert (run, [p.stat().st_ino for p in files(tmp_path)]) == ([], [inode])
    warm(target, latest, DOCUMENT + OTHER)
    assert (run, len(files(tmp_path))) == (OTHER, 2)


def test_only_what_is_warmed_and_long_enough_is_written(target, tmp_path):
    """An answer, an empty document and a few tokens make no file."""
    cache = cache_of(tmp_path, target)
    ask(target, cache, DOCUMENT + QUESTION)
    for ids in ([], DOCUMENT[:15]):
        warm(target, cache, ids)
    assert files(tmp_path) == []


def test_files_of_another_process_are_noticed(target, tmp_path):
    """A cache that looked before a file came in, and once more right behind it, finds it."""
    reader, writer = cache_of(tmp_path, target), cache_of(tmp_path, target)
    for ids in (DOCUMENT, OTHER, THIRD):
        assert ask(target, reader, [*ids, *QUESTION])[1] == 0
        reader.clear()
        warm(target, writer, ids)
        assert ask(target, reader, [*ids, *QUESTION])[1] == 120


def test_files_are_listed_once(target, tmp_path, monkeypatch):
    """While nothing changes, a prompt costs one look at the folder's time."""
    for ids in (DOCUMENT, OTHER):
        warm(target, cache_of(tmp_path, target), ids)
    (folder,) = tmp_path.iterdir()
    os.utime(folder, ns=(0, 0))
    looked = []
    original = prefix_format.read_ids
    monkeypatch.setattr(
        prefix_format, "read_ids", lambda path, *more: looked.append(path) or original(path, *more)
    )
    cache = cache_of(tmp_path, target, memory=0)
    lists = []
    listing = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: lists.append(self) or listing(self))
    for _ in range(4):
        assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120
    assert (sorted(looked), lists) == (files(tmp_path), [folder])


def test_a_drafter_of_the_same_model_shares_the_head(target, tmp_path):
    """The target on a short prompt of its own begins with what was warmed for the long one."""
    warm(target, cache_of(tmp_path, target), DOCUMENT, namespace="tenant")
    own = tuple(DOCUMENT[:50] + QUESTION)

    def reused(namespace: str) -> int:
        cache = cache_of(tmp_path, target)
        drafter = ModelDrafter(target, prefix_cache=cache, namespace=namespace)
        session = drafter.start(DraftContext(prompt_ids=(), drafter_prompt_ids=own))
        length = session._lease.buffer.length
        session.close()
        return length

    assert (reused("tenant"), reused("")) == (50, 0)


# --- hidden states ---


class Reader(ScriptedDrafter):
    """A drafter that has hidden states kept."""

    needs = Needs(hidden=True)


def test_hidden_states_are_kept_with_their_rows(target, tmp_path):
    """A drafter that reads hidden states finds those of a warmed document after a restart; others read none."""
    drafter = Reader(lambda state, budget: Draft())
    cache = cache_of(tmp_path, target)
    warm(target, cache, DOCUMENT, drafter=drafter)
    kept = cache.lease([*DOCUMENT, 0], 200, keeps_hidden=True).buffer.hidden()
    found = cache_of(tmp_path, target).lease([*DOCUMENT, 0], 200, keeps_hidden=True).buffer.hidden()
    assert (kept[0], found[0], found[1].shape) == (0, 0, (120, 48))
    assert torch.equal(kept[1], found[1])
    unasked = cache_of(tmp_path, target).lease([*DOCUMENT, 0], 200).buffer
    assert (unasked.length, unasked.hidden()[0], unasked.keeps_hidden) == (120, 120, False)


def test_hidden_states_begin_where_a_file_without_them_ends(target, tmp_path):
    """Rows that were warmed for a drafter that reads none are unknown, later ones are known."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    assert "hidden" not in load_file(files(tmp_path)[0])
    cache = cache_of(tmp_path, target)
    lease = cache.lease(DOCUMENT + QUESTION, 200, keeps_hidden=True)
    for _ in target.prefill(QUESTION, lease.buffer):
        pass
    first, rows = lease.buffer.hidden()
    assert (first, len(rows)) == (120, 12)
    lease.release(DOCUMENT + QUESTION)
    warm(target, cache, DOCUMENT + QUESTION, drafter=Reader(lambda state, budget: Draft()))
    assert all("hidden" not in load_file(path) for path in files(tmp_path))


# --- kept apart ---


def test_other_models_see_nothing(target, tmp_path, caplog):
    """Weights, dtype and namespace each have files of their own, and are no fault of each other's."""
    warm(target, cache_of(tmp_path, target), DOCUMENT, namespace="a")
    prompt = DOCUMENT + QUESTION
    for model in (tiny_llama(seed=1), tiny_llama().bfloat16(), tiny_llama(rms_norm_eps=1e-3)):
        other = TargetModel(model)
        assert ask(other, cache_of(tmp_path, other), prompt, "a") == (cold(other, prompt), 0)
    assert ask(target, cache_of(tmp_path, target), prompt, "b")[1] == 0
    assert ask(target, cache_of(tmp_path, target), prompt, "a")[1] == 120
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("what", ["weights", "dtype", "namespace"])
def test_a_file_in_the_wrong_folder_is_refused(what, target, tmp_path, caplog):
    """A file that was copied to another model's or tenant's is ignored with one warning."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    (source,) = files(tmp_path)
    model = {"weights": tiny_llama(seed=1), "dtype": tiny_llama().bfloat16()}.get(
        what, target.model
    )
    namespace = "b" if what == "namespace" else ""
    other = TargetModel(model)
    warm(other, cache_of(tmp_path, other), OTHER, namespace)
    (folder,) = {path.parent for path in files(tmp_path)} - {source.parent}
    shutil.copy(source, folder)
    cache, expected = cache_of(tmp_path, other, memory=0), cold(other, DOCUMENT + QUESTION)
    for _ in range(2):
        assert ask(other, cache, DOCUMENT + QUESTION, namespace) == (expected, 0)
    (message,) = warnings_of(caplog)
    assert "belongs to another model" in message


def test_the_identity_is_of_all_that_decides_keys_and_values(tmp_path):
    """One weight, the config or the dtype make another model; its name and the process do not."""
    model = tiny_llama()
    first = model_identity(model)
    model.save_pretrained(tmp_path)
    moved = type(model).from_pretrained(tmp_path)
    assert moved.name_or_path != model.name_or_path
    assert model_identity(moved.eval()) == model_identity(tiny_llama()) == first
    weight = model.model.layers[1].self_attn.k_proj.weight
    weight[-1, -1] += 1e-3
    changed = model_identity(model)
    weight[-1, -1] -= 1e-3
    others = [tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})]
    others.append(tiny_llama().bfloat16())
    assert len({first, changed, *map(model_identity, others)}) == 4


def test_weights_that_are_elsewhere_have_no_identity():
    """Offloaded weights cannot be told from others."""
    model = tiny_llama()
    model.model.layers[1].to("meta")
    assert model_identity(model).kv is None


@torch.inference_mode()
def test_a_model_with_permuted_rows_sees_nothing_of_the_other(target, tmp_path):
    """Fault 25: the same values in other places are another model, whatever their sums are."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    model = tiny_llama()
    rows = model.model.embed_tokens.weight
    rows.copy_(rows.roll(1, dims=0).clone())
    swapped = tiny_llama()
    weight = swapped.model.layers[0].mlp.up_proj.weight
    weight[0, :2] = weight[0, :2].flip(0)
    for other in map(TargetModel, (model, swapped)):
        prompt = DOCUMENT + QUESTION
        assert ask(other, cache_of(tmp_path, other), prompt) == (cold(other, prompt), 0)
    assert len({model_identity(m).weights for m in (target.model, model, swapped)}) == 3


# --- bad files and bad disks ---


def without_a_layer(header, marks):
    del header["key.1"], header["value.1"]


def permuted(header, marks):
    header["key.0"]["shape"] = header["key.0"]["shape"][::-1]


def other_type(header, marks):
    header["key.0"]["dtype"] = "I32"


def no_ids(header, marks):
    del header["ids"]


SPOIL = DAMAGE | {
    "the ids": lambda p: p.write_bytes(p.read_bytes().replace(_ids_of(p)[:8], b"\1" * 8, 1)),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
} | {
    change.__name__: lambda p, change=change: rewrite(p, change)
    for change in (without_a_layer, permuted, other_type, no_ids)
}  # fmt: skip
FEW = ("a bit", "the ids", "cut", "a folder", "another version", "a pipe")


def _ids_of(path: Path) -> bytes:
    return load_file(path)["ids"].numpy().tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "listed"), [(damage, False) for damage in SPOIL] + [(damage, True) for damage in FEW]
)
def test_a_damaged_or_forged_file_is_ignored_with_one_warning(
    damage, listed, target, tmp_path, caplog
):
    """Fault 32: before or after it was listed, answers stay right, the file is named once, and warmed again."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    (path,) = files(tmp_path)
    cache = cache_of(tmp_path, target, memory=0)
    if listed:
        assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120
    SPOIL[damage](path)
    expected = cold(target, DOCUMENT + QUESTION)
    for _ in range(3):
        assert ask(target, cache, DOCUMENT + QUESTION) == (expected, 0)
    (message,) = warnings_of(caplog)
    assert path.name in message
    if damage == "a folder":
        path.rmdir()
    warm(target, cache, DOCUMENT)
    assert ask(target, cache, DOCUMENT + QUESTION) == (expected, 120)
    assert ask(target, cache_of(tmp_path, target), DOCUMENT + QUESTION) == (expected, 120)


def test_a_file_of_other_tokens_under_a_known_name_is_refused(target, tmp_path, caplog):
    """What was listed is compared with what is read: files may be copied over one another."""
    writer = cache_of(tmp_path, target)
    warm(target, writer, DOCUMENT)
    (first,) = files(tmp_path)
    cache = cache_of(tmp_path, target, memory=0)
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120
    warm(target, writer, OTHER)
    (second,) = set(files(tmp_path)) - {first}
    content = second.read_bytes()
    second.unlink()
    os.utime(first.parent, ns=(0, 0))
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120
    first.write_bytes(content)
    assert ask(target, cache, DOCUMENT + QUESTION) == (cold(target, DOCUMENT + QUESTION), 0)
    assert "other tokens" in warnings_of(caplog)[0]


def test_a_file_that_was_removed_is_no_fault(target, tmp_path, caplog):
    """Another process may make room at any time."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    warm(target, cache_of(tmp_path, target), DOCUMENT[:60])
    cache = cache_of(tmp_path, target, memory=0)
    (folder,) = tmp_path.iterdir()
    os.utime(folder, ns=(0, 0))
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120
    for path in files(tmp_path):
        path.unlink()
    os.utime(folder, ns=(0, 0))  # as if it had gone between listing and reading
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 0
    shutil.rmtree(tmp_path)
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 0
    warm(target, cache, DOCUMENT)
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_costs_a_warning(failing, target, tmp_path, caplog, monkeypatch):
    """The prefix stays in memory, nothing half written is left, and nothing raises."""
    cache = cache_of(tmp_path, target)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), full)
    warm(target, cache, DOCUMENT)
    (message,) = warnings_of(caplog)
    assert "120 tokens" in message
    assert "No space left" in message
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120


def test_no_memory_for_a_file_leaves_it_for_later(target, tmp_path, caplog, monkeypatch):
    """Where a buffer does not fit now, the prompt is prefilled; the file is still good."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    cache = cache_of(tmp_path, target, memory=0)

    def full(*args: object, **kwargs: object) -> None:
        msg = "DefaultCPUAllocator: can't allocate memory"
        raise RuntimeError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(prefix_format, "read", full)
        assert ask(target, cache, DOCUMENT + QUESTION)[1] == 0
    assert "can't allocate memory" in warnings_of(caplog)[0]
    assert ask(target, cache, DOCUMENT + QUESTION)[1] == 120


# --- room ---


def test_the_longest_unused_files_go_first(target, tmp_path):
    """Reading a file renews it; the folder's limit holds for all models together."""
    other = TargetModel(tiny_llama(seed=1))
    warm(other, cache_of(tmp_path, other), DOCUMENT)
    (path,) = files(tmp_path)
    size = path.stat().st_size
    os.utime(path, (100, 100))
    warm(target, cache_of(tmp_path, target), OTHER)
    (newer,) = set(files(tmp_path)) - {path}
    os.utime(newer, (200, 200))
    assert ask(other, cache_of(tmp_path, other), DOCUMENT + QUESTION)[1] == 120
    warm(target, cache_of(tmp_path, target, max_bytes=int(2.5 * size)), THIRD)
    assert len(files(tmp_path)) == 2
    assert ask(other, cache_of(tmp_path, other), DOCUMENT + QUESTION)[1] == 120
    assert ask(target, cache_of(tmp_path, target), OTHER + QUESTION)[1] == 0
    assert ask(target, cache_of(tmp_path, target), THIRD + QUESTION)[1] == 120


def test_what_never_fits_is_not_written(target, tmp_path, caplog):
    """A prefix over the folder's whole limit removes nothing and says so."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    cache = cache_of(tmp_path, target, max_bytes=100)
    warm(target, cache, OTHER)
    (message,) = warnings_of(caplog)
    assert "more than the 100" in message
    assert len(files(tmp_path)) == 1
    assert ask(target, cache, OTHER + QUESTION)[1] == 120


def test_what_a_killed_writer_left_is_removed(target, tmp_path):
    """A half written file goes an hour after its last byte; one in the making stays."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    (path,) = files(tmp_path)
    names = ".rasd-new-" + 16 * "a", ".rasd-new-" + 16 * "b", ".rasd-new-mine", ".hidden"
    halves = [path.with_name(name) for name in names]
    for half in halves:
        half.write_bytes(b"half")
        if half != halves[1]:
            os.utime(half, (time.time() - 4000,) * 2)
    warm(target, cache_of(tmp_path, target), OTHER)
    assert [half.exists() for half in halves] == [False, True, True, True]
    assert path.exists()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_files_of_others_are_never_deleted_nor_counted(target, tmp_path):
    """Fault 17: weights, notes and look-alikes in the folder outlive any limit."""
    warm(target, cache_of(tmp_path, target), DOCUMENT)
    (first,) = files(tmp_path)
    size = first.stat().st_size
    others = [
        tmp_path / "my-llama" / "model-00001-of-00002.safetensors",
        tmp_path / "my-llama" / first.name,
        tmp_path / "my-llama" / ".rasd-new-0123456789abcdef",
        tmp_path / ("0" * 32) / f"{'0' * 32}.safetensors",
        tmp_path / "notes.txt",
        first.parent / "mine.rasd-prefix",
        first.parent / "model.safetensors",
    ]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(b"x" * 2 * size)
        os.utime(other, (0, 0))
    before = {path: path.read_bytes() for path in others}
    small = cache_of(tmp_path, target, max_bytes=int(1.5 * size))
    for ids in (OTHER, THIRD):
        warm(target, small, ids)
    assert before == {path: path.read_bytes() for path in others}
    assert len(set(files(tmp_path)) - set(others)) == 1


def test_a_link_is_not_followed_out_of_the_folder(target, tmp_path):
    """Fault 17: a link by one of our names is not deleted, and what it points to even less."""
    folder, outside = tmp_path / "cache", tmp_path / "outside"
    warm(target, cache_of(outside, target), OTHER)
    warm(target, cache_of(folder, target), DOCUMENT)
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (first,) = files(folder)[:1]
    (first.parent / f"{'0' * 32}.rasd-prefix").symlink_to(files(outside)[0])
    before = tree(outside)
    warm(target, cache_of(folder, target, max_bytes=first.stat().st_size + 1000), THIRD)
    assert tree(outside) == before
    assert (first.parent / f"{'0' * 32}.rasd-prefix").is_symlink()


# --- side by side ---


def test_threads_warm_and_ask_at_the_same_time(target, tmp_path, caplog):
    """Every answer is its cold one, whoever wrote the file first."""
    documents = [random_ids(100, seed=s) for s in range(30, 33)]
    prompts = [document + QUESTION for document in documents]
    expected = [cold(target, prompt) for prompt in prompts]
    caches = [cache_of(tmp_path, target), cache_of(tmp_path, target, memory=0)]
    start = threading.Barrier(6)

    def work(i: int) -> list[int]:
        start.wait()
        warm(target, caches[i % 2], documents[i % 3])
        return ask(target, caches[i % 2], prompts[i % 3])[0]

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(work, range(6)))
    assert answers == expected * 2
    assert len(files(tmp_path)) == 3
    assert [ask(target, cache_of(tmp_path, target), p)[1] for p in prompts] == [100] * 3
    assert warnings_of(caplog) == []


PROCESS = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
import test_prefix_files as t
import torch
torch.set_num_threads(1)
target = t.TargetModel(t.tiny_llama())
cache = t.cache_of(Path(sys.argv[1]), target)
print(*t.ask(target, t.cache_of(Path(sys.argv[1]), target), t.THIRD + t.QUESTION)[0])
for ids in (t.DOCUMENT, t.OTHER):
    t.warm(target, cache, ids)
"""


@pytest.mark.slow
def test_processes_share_a_folder(target, tmp_path, caplog):
    """Two processes warm the same documents at once, and read what a third wrote."""
    warm(target, cache_of(tmp_path, target), THIRD)
    code = PROCESS.format(tests=str(HERE.parents[2] / "support"), here=str(HERE.parent))
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    assert said == [[str(t) for t in cold(target, THIRD + QUESTION)]] * 2
    assert len(files(tmp_path)) == 3
    for ids in (DOCUMENT, OTHER):
        prompt = ids + QUESTION
        assert ask(target, cache_of(tmp_path, target), prompt) == (cold(target, prompt), 120)
    assert warnings_of(caplog) == []
