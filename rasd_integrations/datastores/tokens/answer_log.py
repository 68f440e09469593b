"""Keeps answers in a file: each is appended in one write, so that a killed process loses at most its last one."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import numpy as np

from rasd_integrations.datastores.tokens.encoding import Ids, ids_key
from rasd_integrations.errors import StorageError
from rasd_integrations.storage.atomic import replaced_file
from rasd_integrations.storage.marked import adding_to

try:
    import fcntl
except ImportError:  # Windows: two processes may lose one another's last answers
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_MAGIC = b"RAN1"
_HEAD = struct.Struct("<4sII")  # magic, number of ids, CRC-32 of their bytes
_MOST_IDS = 1 << 20  # of an answer
_MOST_BYTES = 1 << 26  # read of a file, its end


class AnswerLog:
    """A file of answers as token ids, shared by processes. No fault of the disk raises: it is logged once.

    A record is ``_HEAD`` and the ids as little-endian uint32. What is damaged is passed over, up to the next record.
    """

    def __init__(self, path: Path, model: str) -> None:
        """Use the file ``path``, which need not exist; ``model`` names its tokenizer's model for people."""
        self.path = path
        self._model = model
        self._said = False

    def read(self) -> list[Ids]:
        """Return the answers, the oldest first."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(size - _MOST_BYTES, 0))
                return [*_records(file.read())]
        except FileNotFoundError:
            return []
        except OSError as err:
            self._report(err)
            return []

    def append(self, ids: Ids) -> None:
        """Add an answer."""

        def write() -> None:
            with self.path.open("ab", buffering=0) as file:
                file.write(_record(ids))

        self._locked(write)

    def remove(self, keys: Collection[int]) -> None:
        """Remove answers by their keys (:func:`ids_key`), also another process's."""

        def write() -> None:
            rows = [ids for ids in self.read() if ids_key(ids) not in keys]
            content = b"".join(map(_record, rows))
            with replaced_file(self.path, len(content)) as file:
                file.write(content)

        self._locked(write)

    def _locked(self, write: Callable[[], None]) -> None:
        """Run ``write`` under the folder's lock; log a fault of the disk."""
        try:
            with (
                adding_to(self.path.parent, "memory", self._model),
                self.path.with_name("lock.rasd-memory").open("ab") as lock,
            ):
                if fcntl is not None:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
                write()
        except (OSError, StorageError) as err:
            self._report(err)

    def _report(self, err: Exception) -> None:
        if not self._said:
            self._said = True
            logger.warning("Answers are not kept for later processes: %s", err)


def _record(ids: Ids) -> bytes:
    content = ids.astype("<u4").tobytes()
    return _HEAD.pack(_MAGIC, len(ids), zlib.crc32(content)) + content


def _records(content: bytes) -> Iterable[Ids]:
    at = content.find(_MAGIC)
    while at >= 0:
        end = at + _HEAD.size
        if end <= len(content):
            _, count, crc = _HEAD.unpack_from(content, at)
            body = content[end : end + 4 * min(count, _MOST_IDS)]
            if count and len(body) == 4 * count and zlib.crc32(body) == crc:
                yield np.frombuffer(body, "<u4").astype(np.uint32)
                at = end + len(body) - 1
        at = content.find(_MAGIC, at + 1)
