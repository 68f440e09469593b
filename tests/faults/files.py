"""Cases about files: killed writers, full and read-only disks, damage, forgery, two processes on one folder."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from forked import Row, finish, killed, run, start
from tiny import tiny_llama, tiny_tokenizer
from tiny_gguf import write_gguf

from rasd_integrations import RASD, SamplingParams
from rasd_integrations.datastores.hidden import DenseStore
from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.runtime.models import shared_model

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
DOCUMENTS = [
    f"Room {i} holds the {w}, who sleeps till noon. " * 6
    for i, w in enumerate(("owl", "fox", "bat"))
]
TEXTS = [
    f"Text {i}: the keeper of room {i * 7919 % 1000} sings at {i % 24}. " * 20 for i in range(400)
]
FOREIGN = {
    "my-llama/model-00001-of-00002.safetensors": b"weights" * 5000,
    "notes.txt": b"mine",
    ".hidden": b"x",
}


def question(document: str) -> list[dict[str, str]]:
    """Return a chat about ``document``."""
    return [{"role": "user", "content": f"{document}\n\nWho sleeps?"}]


def ask(folder: Path, most: int = 1 << 30) -> list[str]:
    """Warm all documents in ``folder`` and answer a question about each."""
    rasd = RASD.from_model(tiny_llama(), tiny_tokenizer(), cache_dir=folder, prefix_disk_bytes=most)
    rasd.warm(DOCUMENTS)
    return [rasd.generate(question(d), PARAMS).text for d in DOCUMENTS]


def plain() -> list[str]:
    """Answer the same questions with no drafter, no cache and no folder."""
    rasd = RASD.from_model(tiny_llama(), tiny_tokenizer(), drafter=None, prefix_cache_bytes=0)
    return [rasd.generate(question(d), PARAMS).text for d in DOCUMENTS]


def build_store(path: Path, texts: int) -> int:
    """Save a token store of the first ``texts`` texts; return its length."""
    store = TokenStore.build(TEXTS[:texts], tiny_tokenizer())
    store.save(path)
    return len(store)


def open_store(path: Path) -> int:
    """Return the length of the store at ``path``, whose texts are all found."""
    store = TokenStore.open(path, tiny_tokenizer())
    assert all(text in store for text in TEXTS[: len(store)])
    return len(store)


def build_hidden(model: Path, folder: Path) -> int:
    """Build a store of hidden states, or go on with one; return its tokens."""
    shared = shared_model(model, {"dtype": "float32"}, executor="eager")
    return DenseStore.build(TEXTS[:40], shared, folder).num_tokens


def convert(path: Path, cache: Path) -> str:
    """Load a GGUF file, which is converted into ``cache`` unless it lies there, and answer."""
    os.environ["RASD_CACHE"] = str(cache)
    rasd = RASD.load(path, model_kwargs={"dtype": "float32"}, executor="eager")
    return rasd.generate(question(DOCUMENTS[0]), PARAMS).text


def compile_model(model: Path, cache: Path) -> str:
    """Load a folder as a compiled model, which is kept in ``cache``, and answer."""
    os.environ["RASD_CACHE"] = str(cache)
    rasd = RASD.load(model, model_kwargs={"dtype": "float32"}, executor="openvino")
    return rasd.generate(question(DOCUMENTS[0]), PARAMS).text


@contextlib.contextmanager
def planted(folder: Path, row: Row) -> Iterator[None]:
    """Put files of a user into ``folder``, and count those that are not there afterwards as they were."""
    for name, content in FOREIGN.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    yield
    for name, content in FOREIGN.items():
        file = folder / name
        if not file.is_file() or file.read_bytes() != content:
            row.lost += 1
            row.notes.append(f"{name} is gone or changed")


def kills(
    name: str, work: Path, runs: int, action: Callable[[Path], tuple[Any, ...]], expected: Any
) -> Row:
    """Kill an action at ``runs`` moments of its run, then let it run to its end over what that left."""
    row = Row(name)
    began = time.monotonic()
    function, *args = action(work / "whole")
    whole = run(function, *args)
    length = time.monotonic() - began
    row.judge(whole, expected)
    for i in range(runs):
        folder = work / str(i)
        folder.mkdir(parents=True)
        with planted(folder, row):
            function, *args = action(folder)
            killed(function, length * (i + 0.5) / runs, *args)
            row.judge(run(function, *args), expected)
        shutil.rmtree(folder)
    return row


def kill_cases(work: Path, runs: int) -> Iterator[Row]:
    """Kill processes while they write each kind of file."""
    model = work / "model"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    gguf = write_gguf(work / "tiny.gguf")
    yield kills(
        "kill -9 while kept prompts are written",
        work / "a",
        runs,
        lambda f: (ask, f),
        run(plain).value,
    )
    dense = run(build_hidden, model, work / "reference").value
    yield kills(
        "kill -9 while hidden states are stored",
        work / "b",
        runs,
        lambda f: (build_hidden, model, f),
        dense,
    )
    text = run(convert, gguf, work / "c-reference").value
    yield kills(
        "kill -9 while a GGUF file is converted",
        work / "c",
        runs,
        lambda f: (convert, gguf, f),
        text,
    )
    text = run(compile_model, model, work / "d-reference").value
    yield kills(
        "kill -9 while a model is compiled",
        work / "d",
        runs,
        lambda f: (compile_model, model, f),
        text,
    )
    yield stores(work / "e", runs)


def stores(work: Path, runs: int) -> Row:
    """Kill a process that saves a token store over an older one: the older or the newer one is there, whole."""
    row = Row("kill -9 while a token store is saved over an older one")
    work.mkdir()
    path = work / "store"
    began = time.monotonic()
    run(build_store, path, len(TEXTS))
    length = time.monotonic() - began
    for i in range(runs):
        build = run(build_store, path, 100)
        killed(build_store, length * (i + 0.5) / runs, path, len(TEXTS))
        said = run(open_store, path)
        row.judge(said, len(TEXTS) if said.value == len(TEXTS) else build.value)
        row.lost += bool(said.error)
    return row


@contextlib.contextmanager
def disk(size: int, *, read_only: bool = False) -> Iterator[Path]:
    """Mount a disk of ``size`` bytes in memory; needs root.

    Raises:
        PermissionError: This user may not mount.
    """
    folder = Path(tempfile.mkdtemp(prefix="rasd-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}"]
    if subprocess.run([*mount, "tmpfs", folder], check=False, capture_output=True).returncode:
        folder.rmdir()
        msg = "mounting a small disk needs root"
        raise PermissionError(msg)
    try:
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=False)
        folder.rmdir()


def disk_cases(work: Path, runs: int) -> Iterator[Row]:
    """Answer, convert and store on disks that are full or may not be written."""
    gguf = write_gguf(work / "disk.gguf")
    expected, text = run(plain).value, run(convert, gguf, work / "disk-reference").value
    for kind, read_only in (("full", False), ("read-only", True)):
        cached, converted = (
            Row(f"kept prompts on a {kind} disk"),
            Row(f"a GGUF file converted on a {kind} disk"),
        )
        saved = Row(f"a token store saved on a {kind} disk")
        for i in range(runs):
            # Full at another byte each time: a page for nothing up to room for a part.
            size = 4096 * (1 + 8 * i)
            with disk(size, read_only=read_only) as folder:
                # A folder that cannot be written to is refused before any work.
                cached.judge(run(ask, folder / "kept"), expected, may_refuse=read_only)
            with disk(size, read_only=read_only) as folder:
                converted.judge(run(convert, gguf, folder), text)
            with disk(size, read_only=read_only) as folder:
                saved.judge(
                    run(build_store, folder / "store", len(TEXTS)), len(TEXTS), may_refuse=True
                )
        yield from (cached, converted, saved)


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a bit flipped": lambda data, rng: _flipped(data, rng.randrange(len(data))),
    "a bit of the head flipped": lambda data, rng: _flipped(
        data, rng.randrange(min(64, len(data)))
    ),
    "cut": lambda data, rng: data[: rng.randrange(len(data))],
    "empty": lambda data, rng: b"",
    "longer": lambda data, rng: data + b"\0" * rng.randrange(1, 99),
    "zeros": lambda data, rng: bytes(len(data)),
    "a huge head": lambda data, rng: b"\xff" * 8 + data[8:],
    "deep JSON": lambda data, rng: _forged(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "JSON of another kind": lambda data, rng: _forged(b"[1, 2, 3]"),
    "reversed offsets": lambda data, rng: data.replace(
        b'"data_offsets":[0,', b'"data_offsets":[9,', 1
    ),
    "another shape": lambda data, rng: data.replace(b'"shape":[2', b'"shape":[4', 1),
    "another type": lambda data, rng: data.replace(b'"F32"', b'"I32"', 1),
}


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _forged(head: bytes) -> bytes:
    return len(head).to_bytes(8, "little") + head + bytes(64)


def damage_cases(work: Path, runs: int) -> Iterator[Row]:
    """Damage or forge each kind of file, then use it."""
    expected = run(plain).value
    gguf = write_gguf(work / "damage.gguf")
    text = run(convert, gguf, work / "damage-reference").value
    kept, converted, stored = (
        Row(f"{what} damaged or made by hand")
        for what in ("kept prompts", "converted models", "token stores")
    )
    for number, spoil in enumerate(DAMAGE.values()):
        for i in range(runs):
            rng = random.Random(1000 * number + i)
            folder = work / "spoilt"
            run(ask, folder / "kept")
            run(convert, gguf, folder / "cache")
            length = run(build_store, folder / "store", 50).value
            _spoil(folder / "kept", spoil, rng)
            kept.judge(run(ask, folder / "kept"), expected)
            _spoil(folder / "cache", spoil, rng)
            converted.judge(run(convert, gguf, folder / "cache"), text)
            _spoil(folder / "store", spoil, rng)
            stored.judge(run(open_store, folder / "store"), length, may_refuse=True)
            shutil.rmtree(folder)
    yield from (kept, converted, stored)


def _spoil(place: Path, spoil: Callable[[bytes, random.Random], bytes], rng: random.Random) -> None:
    files = (
        [place]
        if place.is_file()
        else sorted(f for f in place.rglob("*") if f.is_file() and f.stat().st_size)
    )
    file = rng.choice(files)
    file.write_bytes(spoil(file.read_bytes(), rng))


def shared_cases(work: Path, runs: int) -> Iterator[Row]:
    """Let two processes use one folder at once, which is too small for what both want to keep."""
    row = Row("two processes on one folder that is too small")
    expected = run(plain).value
    for i in range(runs):
        folder = work / f"shared-{i}"
        folder.mkdir()
        with planted(folder, row):
            pair = [start(ask, folder, 300_000) for _ in range(2)]
            for process in pair:
                row.judge(finish(*process), expected)
    yield row
