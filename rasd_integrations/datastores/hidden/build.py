"""Builds a store: the target reads texts part by part; finished parts survive a kill.

Texts are split in pieces and shuffled, so that the first parts are a fair sample to fit the transform on. These
keep hidden states, all others keys. The last step groups the keys by next token.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.datastores.hidden.transform import Transform
from rasd_integrations.datastores.mapped_file import MappedFile, StoreKind
from rasd_integrations.datastores.tokens.encoding import SEPARATOR, Ids, portions
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.retrieval.items import items_of, text_of
from rasd_integrations.storage.tensor_file import (
    FileKind,
    UnusableFileError,
    content_of,
    write,
)

FILE = "store.safetensors"
KIND = StoreKind(
    FileKind("rasd-dense-store", "2"), "dense store", "DenseStore.build(texts, model, folder)"
)
_PARTS = "parts"
_PART_NAME = re.compile(r"[0-9a-f]{16}-[0-9]{6,}\.safetensors")  # of this build or an abandoned one
_PIECE = 1024  # tokens of a text that are read together, as in DReSD
_PART = 1 << 14  # tokens that a kill loses, at most
_SAMPLE = 4  # parts whose hidden states are kept to fit the transform to
_LARGEST = 6e4  # of float16

Halves = NDArray[np.float16]
Progress = Callable[[int, int], object]


class Reader(Protocol):
    """A model as a store needs it, such as :class:`rasd_integrations.runtime.models.SharedModel`."""

    target: TargetModel
    tokenizer: Any
    name: str

    @property
    def fingerprint(self) -> str:
        """Digest of the weights."""
        ...


class Piece(NamedTuple):
    """Tokens that are read together: little-endian uint32, of which the first ``skip`` are not kept (BOS)."""

    ids: bytes
    skip: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens to read."""
        return len(self.ids) // 4


def build(source: Any, model: Reader, folder: Path, progress: Progress | None) -> None:
    """Build the store in ``folder``; see :meth:`DenseStore.build`.

    Raises:
        ConfigurationError: An unusable source or item, ids outside the vocabulary, or nothing to learn.
        StorageError: The folder cannot be written to, or the disk is full.
    """
    pieces = sorted(set(_pieces(source, model)))
    if not pieces:
        msg = "The texts hold no three tokens in a row, so there is nothing to learn. Give longer texts."
        raise ConfigurationError(msg)
    random.Random(0).shuffle(pieces)
    job = _job(pieces, model)
    if (_marks(folder / FILE) or {}).get("job") == job:
        return
    parts = list(portions(pieces, _PART, lambda piece: piece.num_tokens))
    total, count = sum(piece.num_tokens for piece in pieces), 0

    def tick(num_tokens: int) -> None:
        nonlocal count
        count += num_tokens
        if progress is not None:
            progress(count, total)

    def read(number: int, transform: Transform | None) -> tuple[Ids, Halves]:
        path = folder / _PARTS / f"{job}-{number:06}.safetensors"
        if _marks(path) is None:
            write_arrays(path, _states(parts[number], model.target, transform, tick), {})
        else:
            tick(sum(piece.num_tokens for piece in parts[number]))
        with KIND.errors(path):
            part = MappedFile(path, KIND, verify=False)
            return part.array("ids", "U32"), part.array("rows", "F16")

    sample = [read(number, None) for number in range(min(_SAMPLE, len(parts)))]
    transform = Transform.fit(rows for _, rows in sample)
    rest = [read(number, transform) for number in range(len(sample), len(parts))]
    keys = [transform(rows).astype(np.float16) for _, rows in sample]
    arrays = grouped(
        np.concatenate([ids for ids, _ in (*sample, *rest)]),
        np.concatenate([*keys, *(rows for _, rows in rest)]),
    )
    arrays |= {"mean": transform.mean, "basis": transform.basis}
    marks = {"model": model.fingerprint, "name": model.name, "job": job}
    write_arrays(folder / FILE, arrays, marks)
    with contextlib.suppress(OSError):  # other files there stay, and then the folder does, too
        for part in (folder / _PARTS).iterdir():
            if _PART_NAME.fullmatch(part.name):
                part.unlink()
        (folder / _PARTS).rmdir()


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], marks: Mapping[str, str]) -> None:
    """Write a store's or a part's arrays atomically."""
    write(path, KIND.file, marks, {name: content_of(array) for name, array in arrays.items()})


def _pieces(source: Any, model: Reader) -> Iterator[Piece]:
    """Yield the pieces of three tokens or more."""
    tokenizer = copy.deepcopy(model.tokenizer)  # answers may be using the original
    target, start = model.target, tokenizer("")["input_ids"][:1]
    if start != [getattr(tokenizer, "bos_token_id", None)]:
        start = []
    for item in items_of(source):
        if _is_ids(item):
            row, head, size = list(item), [], target.window
        else:
            text = text_of(item).encode("utf-8", "replace").decode()
            options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            row, head = tokenizer(text, **options)["input_ids"], start
            size = min(_PIECE, target.window - len(head))
        if row and not 0 <= min(row) <= max(row) < target.vocab_size:
            msg = f"A token id is outside 0..{target.vocab_size - 1}. Give ids of the model's own tokenizer."
            raise ConfigurationError(msg)
        for first in range(0, len(row) - 2, size):
            ids = np.array([*head, *row[first : first + size]], "<u4")
            if len(ids) > len(head) + 2:
                yield Piece(ids.tobytes(), len(head))


def _is_ids(item: Any) -> bool:
    return (
        isinstance(item, Sequence | np.ndarray)
        and len(item) > 0
        and isinstance(item[0], int | np.integer)
    )


def _job(pieces: Iterable[Piece], model: Reader) -> str:
    """Return the identity of a build, by which its parts are told from others'."""
    digest = hashlib.blake2b(model.fingerprint.encode(), digest_size=8)
    for piece in pieces:
        digest.update(f"{piece.skip},{len(piece.ids)};".encode() + piece.ids)
    return digest.hexdigest()


def _marks(path: Path) -> Mapping[str, str] | None:
    """Return the marks of a finished file, ``None`` if it is missing or damaged."""
    try:
        return MappedFile(path, KIND).marks
    except (OSError, UnusableFileError):
        return None


def _states(
    pieces: Iterable[Piece],
    target: TargetModel,
    transform: Transform | None,
    tick: Callable[[int], object],
) -> dict[str, NDArray[Any]]:
    """Run the target; return the pieces' ids, and hidden states or keys of all positions with two followers."""
    ids: list[Ids] = []
    rows: list[Halves] = []
    for piece in pieces:
        read = np.frombuffer(piece.ids, "<u4")
        buffer = KVBuffer(len(read), keeps_hidden=True)
        for _ in target.prefill(read.tolist(), buffer):
            pass
        hidden = buffer.hidden(piece.skip)[1][:-2].float().clamp(-_LARGEST, _LARGEST)
        states = hidden.cpu().numpy().astype(np.float16)
        rows.append(states if transform is None else transform(states).astype(np.float16))
        ids.append(np.append(read[piece.skip :], np.uint32(SEPARATOR)))
        tick(piece.num_tokens)
    return {"ids": np.concatenate(ids), "rows": np.concatenate(rows)}


def grouped(ids: Ids, keys: Halves) -> dict[str, NDArray[Any]]:
    """Return ids, and keys with the positions of their followers, grouped by next token, by position within."""
    inside = ids != SEPARATOR
    positions = np.flatnonzero(inside[:-2] & inside[1:-1] & inside[2:])
    following = ids[positions + 1]
    order = np.argsort(following, kind="stable")
    tokens, starts = np.unique(following[order], return_index=True)
    return {
        "ids": ids,
        "keys": keys[order],
        "positions": (positions[order] + 2).astype(np.uint32),
        "tokens": tokens,
        "starts": np.append(starts, len(order)).astype(np.int64),
    }
