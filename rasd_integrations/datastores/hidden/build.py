"""From texts to a store: the target reads them part by part; finished parts outlive a kill.

Texts are cut in pieces and shuffled, so that the first parts are a fair sample to fit the transform on.
These keep hidden states, all others keys. The last step sorts the keys by the token that came next.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.datastores.hidden import file
from rasd_integrations.datastores.hidden.transform import Transform
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError, RetrievalError
from rasd_integrations.retrieval.items import items_of, text_of

FILE = "store.safetensors"
SEPARATOR = 0xFFFF_FFFF  # stands behind each piece; no token has this id
_PARTS = "parts"
_PART_NAME = re.compile(
    r"[0-9a-f]{16}-[0-9]{6,}\.safetensors"
)  # of this job, or of one that was given up
_PIECE = 1024  # tokens of a text that are read together, as in DReSD
_PART = 1 << 14  # tokens that a kill loses, at most
_SAMPLE = 4  # parts whose hidden states are kept until the transform is fitted to them
_LARGEST = 6e4  # of float16

Ids = NDArray[np.uint32]
Progress = Callable[[int, int], object]


class Reader(Protocol):
    """What a store needs of a model; :class:`rasd_integrations.runtime.models.SharedModel` has it.

    Attributes:
        target: The weights, ready for steps.
        tokenizer: The model's own.
        name: What the model was loaded from.
    """

    target: TargetModel
    tokenizer: Any
    name: str

    @property
    def fingerprint(self) -> str:
        """The weights' identity."""
        ...


class Piece(NamedTuple):
    """Tokens that are read together.

    Attributes:
        ids: Little-endian uint32.
        skip: Leading tokens that are read and not kept: what the tokenizer begins every prompt with.
    """

    ids: bytes
    skip: int

    @property
    def num_tokens(self) -> int:
        """Tokens to be read."""
        return len(self.ids) // 4


def build(source: Any, model: Reader, folder: Path, progress: Progress | None) -> None:
    """Make the store in ``folder``; :meth:`DenseStore.build` says how.

    Raises:
        ConfigurationError: An unusable source or item, ids that the model does not know, or nothing to learn.
        StorageError: The folder cannot be written to, or the disk is full.
    """
    pieces = sorted(set(_pieces(source, model)))
    if not pieces:
        msg = "The texts hold no three tokens in a row, so there is nothing to learn. Give longer texts."
        raise ConfigurationError(msg)
    random.Random(0).shuffle(pieces)
    job = _job(pieces, model)
    done = _read(folder / FILE)
    if done is not None and done.marks.get("job") == job:
        return
    parts = list(_portions(pieces))
    total, count = sum(piece.num_tokens for piece in pieces), 0

    def tick(num_tokens: int) -> None:
        nonlocal count
        count += num_tokens
        if progress is not None:
            progress(count, total)

    def read(number: int, transform: Transform | None) -> file.ArrayFile:
        path = folder / _PARTS / f"{job}-{number:06}.safetensors"
        kept = _read(path)
        if kept is None:
            file.write(path, _states(parts[number], model.target, transform, tick), {})
            return file.ArrayFile(path)
        tick(sum(piece.num_tokens for piece in parts[number]))
        return kept

    sample = [read(number, None) for number in range(min(_SAMPLE, len(parts)))]
    transform = Transform.fit(part["rows"] for part in sample)
    rest = [read(number, transform) for number in range(len(sample), len(parts))]
    keys = [transform(part["rows"]).astype(np.float16) for part in sample]
    arrays = grouped(
        np.concatenate([part["ids"] for part in (*sample, *rest)]),
        np.concatenate([*keys, *(part["rows"] for part in rest)]),
    )
    arrays |= {"mean": transform.mean, "basis": transform.basis}
    marks = {"model": model.fingerprint, "name": model.name, "job": job}
    file.write(folder / FILE, arrays, marks)
    with contextlib.suppress(OSError):  # what others put there stays, and so does the folder then
        for part in (folder / _PARTS).iterdir():
            if _PART_NAME.fullmatch(part.name):
                part.unlink()
        (folder / _PARTS).rmdir()


def _pieces(source: Any, model: Reader) -> Iterator[Piece]:
    """Yield the pieces of a source that something can be learned from."""
    tokenizer = copy.deepcopy(model.tokenizer)  # one that answers do not use at the same time
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
    """Return the identity of a build: parts of another one are not taken for its own."""
    digest = hashlib.blake2b(model.fingerprint.encode(), digest_size=8)
    for piece in pieces:
        digest.update(f"{piece.skip},{len(piece.ids)};".encode() + piece.ids)
    return digest.hexdigest()


def _portions(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    part: list[Piece] = []
    size = 0
    for piece in pieces:
        part.append(piece)
        size += piece.num_tokens
        if size >= _PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _read(path: Path) -> file.ArrayFile | None:
    """Return what was finished before; what is damaged is made again."""
    try:
        return file.ArrayFile(path)
    except RetrievalError:
        return None


def _states(
    pieces: Iterable[Piece],
    target: TargetModel,
    transform: Transform | None,
    tick: Callable[[int], object],
) -> dict[str, NDArray[Any]]:
    """Run the target and return the pieces' ids, and hidden states or keys of all places with two followers."""
    ids: list[Ids] = []
    rows: list[NDArray[np.float16]] = []
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


def grouped(ids: Ids, keys: NDArray[np.float16]) -> dict[str, NDArray[Any]]:
    """Return ids, and keys with the places of their followers, grouped by next token, in order of place."""
    inside = ids != SEPARATOR
    places = np.flatnonzero(inside[:-2] & inside[1:-1] & inside[2:])
    said = ids[places + 1]
    order = np.argsort(said, kind="stable")
    tokens, starts = np.unique(said[order], return_index=True)
    return {
        "ids": ids,
        "keys": keys[order],
        "places": (places[order] + 2).astype(np.uint32),
        "tokens": tokens,
        "starts": np.append(starts, len(order)).astype(np.int64),
    }
