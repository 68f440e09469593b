"""The file of a token store: the arrays of each shard."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path

import numpy as np

from rasd_integrations.datastores.mapped_file import MappedFile, StoreKind
from rasd_integrations.datastores.tokens.shard import Shard
from rasd_integrations.storage import tensor_file
from rasd_integrations.storage.tensor_file import FileKind, content_of, refuse

_KIND = StoreKind(
    FileKind("rasd-token-store", "2"), "token store", "TokenStore.build(texts, encode).save(path)"
)


def write(path: Path, shards: Sequence[Shard], tokenizer: str) -> None:
    """Write chunks that were not removed to ``path`` atomically.

    Raises:
        StorageError: The disk is full, or the folder cannot be written to.
    """
    arrays = {}
    for i, shard in enumerate(shard.compact() for shard in shards):
        arrays[f"{i}.keys"] = content_of(shard.keys)
        arrays[f"{i}.starts"] = content_of(shard.starts)
        arrays[f"{i}.order"] = content_of(shard.order)
        # Big-endian, the order that look-ups compare bytes in, which the format has no type for.
        arrays[f"{i}.text"] = content_of(shard.text.view(np.uint8).reshape(-1, 4))
    tensor_file.write(path, _KIND.file, {"tokenizer": tokenizer}, arrays)


def read(path: Path, tokenizer: str, *, verify: bool = True) -> tuple[Shard, ...]:
    """Map a file's shards; its ``tokenizer`` must be this fingerprint.

    Raises:
        RetrievalError: There is no such file, it is damaged, of another format or of another tokenizer.
    """
    with _KIND.errors(path):
        file = MappedFile(path, _KIND, verify=verify)
        if (found := file.marks.get("tokenizer")) != tokenizer:
            refuse(f"its ids are of another tokenizer, {found} instead of {tokenizer}")
        if hasattr(mmap, "MADV_RANDOM"):  # look-ups jump: reading ahead would only fill memory
            file.bytes.madvise(mmap.MADV_RANDOM)
        return tuple(_shards(file))


def _shards(file: MappedFile) -> Iterator[Shard]:
    for i in takewhile(lambda i: f"{i}.keys" in file.entries, count()):
        text = file.array(f"{i}.text", "U8").reshape(-1).view(">u4")
        order, starts = file.array(f"{i}.order", "U32"), file.array(f"{i}.starts", "U32")
        keys = file.array(f"{i}.keys", "U64")
        alive, base = np.ones(len(keys), bool), file.entries[f"{i}.text"].start
        yield Shard(text, order, starts, keys, alive, file.bytes, base, file)
