"""On-disk prefix cache: one file per prefix, found by longest common prefix.

A folder may serve many models, namespaces and processes: each pair of model and namespace has a subfolder of its
own and reads no other. Any other files are the user's: they are neither counted nor deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from os import utime
from pathlib import Path

import torch

from rasd_integrations.engine.kv import prefix_format
from rasd_integrations.engine.kv.buffer import KVBuffer, KVLayout
from rasd_integrations.engine.kv.prefix_format import Ids
from rasd_integrations.storage.atomic import clear_abandoned
from rasd_integrations.storage.marked import adding_to, marked_folders
from rasd_integrations.storage.tensor_file import UnusableFileError

logger = logging.getLogger(__name__)

# A shorter match (a system prompt) is cheaper to prefill than an entry is to give up, copy or read.
LEAST_REUSE = 16
_READ_PER_ROW = 16  # rows of a file that may be read for each one that it spares
_SUFFIX = ".rasd-prefix"
_RECENT_NS = 1_000_000_000  # a folder's time may not change for this long while files come in
_DAMAGE = (OSError, UnusableFileError)


@dataclass(slots=True)
class _FolderIndex:
    """The files of one model and namespace."""

    folder: Path  # need not exist
    key: str  # that its files must carry
    ids: dict[str, Ids] = field(default_factory=dict)  # by file name
    states: dict[str, tuple[int, int]] = field(default_factory=dict)  # inode and size of all files
    seen: int = -1  # modification time of the folder when it was last listed


class PrefixFiles:
    """Prefixes of one model in a folder; safe under threads and processes.

    No fault of a file or the disk raises: it is logged, once a file, and the prefix is a miss.
    """

    def __init__(
        self,
        folder: Path,
        identity: Callable[[], str | None],
        layout: KVLayout,
        max_bytes: int,
        device: torch.device,
        *,
        model: str = "",
    ) -> None:
        """Use ``folder``, without reading it yet.

        Args:
            folder: May be shared with other models.
            identity: The model's current :func:`~rasd_integrations.loading.identity.model_identity`, if it has one.
            layout: Of the model; files with other layers are not used.
            max_bytes: Limit of all our files in the folder; least recently used files are evicted first.
            device: Device of the buffers.
            model: Its name, for people who look at the folder.
        """
        self._folder = folder
        self._identity = identity
        self._layout = layout
        self._max_bytes = max_bytes
        self._device = device
        self._model = model
        self._indices: dict[tuple[str, str], _FolderIndex] = {}
        self._lock = threading.Lock()

    def load(
        self,
        ids: Ids,
        namespace: str,
        capacity: int,
        *,
        beyond: int = 0,
        keeps_hidden: bool = False,
    ) -> KVBuffer | None:
        """Return a buffer with the longest prefix of ``ids`` in a file, if reading it pays.

        Args:
            ids: The prompt.
            namespace: Only its files are searched.
            capacity: Tokens to plan for.
            beyond: Tokens available without a file.
            keeps_hidden: Read hidden states, too, if the file has them.
        """
        if not self._folder.is_dir() or (index := self._index(namespace)) is None:
            return None  # nothing was ever warmed, which is known before the weights are read
        while (found := self._longest(index, ids, beyond)) is not None:
            name, length = found
            path = index.folder / name
            try:
                buffer = prefix_format.read(
                    path, index.key, self._layout, ids[:length], capacity, self._device,
                    keeps_hidden=keeps_hidden,
                )  # fmt: skip
            except _DAMAGE as err:
                self._forget(index, name, err)
            except (MemoryError, RuntimeError) as err:  # torch's allocators raise either
                logger.warning("%s is not read: %s", path, err)
                return None
            else:
                with contextlib.suppress(OSError):
                    utime(path)
                return buffer
        return None

    def save(self, ids: Ids, namespace: str, buffer: KVBuffer) -> None:
        """Write the first ``len(ids)`` rows of ``buffer`` to a new file, unless one has them all."""
        if (index := self._index(namespace)) is None:
            return
        with self._lock:
            held = self._listed(index).values()
            known = any(common_prefix(other, ids) == len(ids) for other in held)
        if known or len(ids) < LEAST_REUSE:
            return
        name = hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).hexdigest()
        size = buffer.row_nbytes * len(ids)
        try:
            if size > self._max_bytes:
                msg = f"{size} bytes are more than the {self._max_bytes} that the folder may hold"
                raise ValueError(msg)  # noqa: TRY301 -- one warning says that it stays in memory
            with adding_to(index.folder, "prefixes", self._model):
                self._make_room(size)
                prefix_format.write(index.folder / f"{name}{_SUFFIX}", index.key, ids, buffer)
        except (OSError, ValueError) as err:
            logger.warning(
                "a prefix of %d tokens is not kept in %s: %s", len(ids), self._folder, err
            )

    def _index(self, namespace: str) -> _FolderIndex | None:
        if (identity := self._identity()) is None:
            return None
        known = identity, namespace
        with self._lock:
            if known not in self._indices:
                key = hashlib.blake2b(json.dumps(known).encode(), digest_size=16).hexdigest()
                self._indices[known] = _FolderIndex(self._folder / key, key)
            return self._indices[known]

    def _longest(self, index: _FolderIndex, ids: Ids, beyond: int) -> tuple[str, int] | None:
        """Return name and length of the longest common prefix that pays, of equal ones the shortest file."""
        with self._lock:
            held = dict(self._listed(index))
        best = (0, 0, "")
        for name, other in held.items():
            common = common_prefix(other, ids)
            spared = common - beyond
            if spared >= LEAST_REUSE and spared * _READ_PER_ROW >= len(other):
                best = max(best, (common, -len(other), name))
        length, _, name = best
        return (name, length) if name else None

    def _listed(self, index: _FolderIndex) -> Mapping[str, Ids]:
        """Return the ids of all usable files; costs one ``stat`` while nothing changes."""
        try:
            changed = index.folder.stat().st_mtime_ns
            if changed == index.seen:
                return index.ids
            index.seen = changed if time.time_ns() - changed > _RECENT_NS else -1
            paths = [p for p in index.folder.iterdir() if p.suffix == _SUFFIX]
        except OSError:  # nothing was ever warmed, or the disk is gone
            paths = []
        states = {path.name: state for path in paths if (state := _state(path)) is not None}
        new = [name for name, state in states.items() if index.states.get(name) != state]
        index.ids = {n: held for n, held in index.ids.items() if n in states and n not in new}
        index.states = states
        for name in new:
            path = index.folder / name
            try:
                index.ids[name] = prefix_format.read_ids(path, index.key, self._layout)
            except _DAMAGE as err:
                logger.warning("%s is ignored: %s", path, err)
        return index.ids

    def _forget(self, index: _FolderIndex, name: str, err: Exception) -> None:
        """Ignore a file until another takes its name; warn unless it was removed to make room."""
        path = index.folder / name
        with self._lock:
            index.ids.pop(name, None)
            if (state := _state(path)) is not None:
                index.states[name] = state
                logger.warning("%s is ignored: %s", path, err)

    def _make_room(self, nbytes: int) -> None:
        """Evict least recently used files until ``nbytes`` fit; remove what killed writers left."""
        files = []
        for own in marked_folders(self._folder):
            if own.kind == "prefixes":
                clear_abandoned(own.path)
                files += [(stat.st_mtime, stat.st_size, path) for path, stat in own.files()]
        total = sum(size for _, size, _ in files) + nbytes
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                break
            with contextlib.suppress(OSError):  # another process may remove it at the same time
                path.unlink()
                total -= size


def common_prefix(a: Ids, b: Ids) -> int:
    """Return the number of leading tokens that two prompts share."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _state(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:  # another process has just removed it
        return None
    return stat.st_ino, stat.st_size
