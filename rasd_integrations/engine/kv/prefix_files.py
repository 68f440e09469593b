"""Prefixes on disk, a file each, found by their longest common head.

A folder may serve many models, namespaces and processes: each pair of model and namespace has a folder of
its own in it, and reads no other. What else lies there is the user's: it is neither counted nor deleted.
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
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_format import Ids, RowLayout
from rasd_integrations.storage.atomic import clear_abandoned
from rasd_integrations.storage.marked import foreign, mark, marked, marked_folders
from rasd_integrations.storage.tensor_file import UnusableFileError

logger = logging.getLogger(__name__)

# A shorter match (a system prompt) is cheaper to prefill than an entry is to give up, copy or read.
LEAST_REUSE = 16
_READ_PER_ROW = 16  # rows of a file that may be read for each one that it spares
_SUFFIX = ".rasd-prefix"
_RECENT_NS = 1_000_000_000  # a folder's time may stand still for this long while files come in
_DAMAGE = (OSError, UnusableFileError)
_NAMED = 5  # of the files that are not ours, at most


@dataclass(slots=True)
class _Shelf:
    """What is known of one model's and namespace's folder.

    Attributes:
        folder: It need not be there.
        key: Its files must carry it.
        ids: Token ids by file name.
        states: Inode and size of every file that was looked at, usable or not.
        seen: The folder's time when it was listed last.
    """

    folder: Path
    key: str
    ids: dict[str, Ids] = field(default_factory=dict)
    states: dict[str, tuple[int, int]] = field(default_factory=dict)
    seen: int = -1


class PrefixFiles:
    """Prefixes of one model in a folder, found by their longest common head; safe under threads and processes.

    Nothing that is wrong with a file or the disk raises: it is logged, once a file, and the prefix is as unknown.
    """

    def __init__(
        self,
        folder: Path,
        identity: Callable[[], str],
        layout: RowLayout,
        max_bytes: int,
        device: torch.device,
        *,
        row_major: bool = False,
        model: str = "",
    ) -> None:
        """Use ``folder``, and read none of it yet.

        Args:
            folder: May be shared with other models.
            identity: Says which model it is by now; see :func:`~rasd_integrations.loading.identity.model_identity`.
            layout: Of the model's rows; files with others are not used.
            max_bytes: Most that all files of ours in the folder may hold; the longest unused go first.
            device: Where keys and values are wanted.
            row_major: Lay keys out row by row.
            model: Its name, for people who look at the folder.
        """
        self._folder = folder
        self._identity = identity
        self._layout = layout
        self._max_bytes = max_bytes
        self._device = device
        self._row_major = row_major
        self._model = model
        self._shelves: dict[tuple[str, str], _Shelf] = {}
        self._said_others = False
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
        """Return a buffer with the longest prefix of ``ids`` that a file holds, if reading it pays.

        Args:
            ids: The prompt.
            namespace: Only its files are seen.
            capacity: Tokens to plan for.
            beyond: Rows that can be had without a file.
            keeps_hidden: Read hidden states, too, where the file has them.
        """
        shelf = self._shelf(namespace)
        while (found := self._longest(shelf, ids, beyond)) is not None:
            name, length = found
            try:
                buffer = prefix_format.read(
                    shelf.folder / name, shelf.key, self._layout, ids[:length], capacity, self._device,
                    keeps_hidden=keeps_hidden, row_major=self._row_major,
                )  # fmt: skip
            except _DAMAGE as err:
                self._forget(shelf, name, err)
            except (MemoryError, RuntimeError) as err:  # torch's allocators raise either
                logger.warning("%s is not read: %s", shelf.folder / name, err)
                return None
            else:
                with contextlib.suppress(OSError):
                    utime(shelf.folder / name)
                return buffer
        return None

    def save(self, ids: Ids, namespace: str, buffer: KVBuffer) -> None:
        """Write the first ``len(ids)`` rows of ``buffer`` to a file of their own, unless one has them all."""
        shelf = self._shelf(namespace)
        with self._lock:
            known = any(
                common_prefix(held, ids) == len(ids) for held in self._listed(shelf).values()
            )
        if known or len(ids) < LEAST_REUSE:
            return
        digest = hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=16).hexdigest()
        size = buffer.row_nbytes * len(ids)
        try:
            if size > self._max_bytes:
                msg = f"{size} bytes are more than the {self._max_bytes} that the folder may hold"
                raise ValueError(msg)  # noqa: TRY301 -- one place says that it stays in memory
            if marked(shelf.folder) is None:
                mark(shelf.folder, "kept prompts", self._model)
            self._make_room(size)
            prefix_format.write(shelf.folder / f"{digest}{_SUFFIX}", shelf.key, ids, buffer)
        except (OSError, ValueError) as err:
            logger.warning(
                "a prefix of %d tokens is not kept in %s: %s", len(ids), self._folder, err
            )

    def _shelf(self, namespace: str) -> _Shelf:
        said = self._identity(), namespace
        with self._lock:
            if said not in self._shelves:
                key = hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()
                self._shelves[said] = _Shelf(self._folder / key, key)
            return self._shelves[said]

    def _longest(self, shelf: _Shelf, ids: Ids, beyond: int) -> tuple[str, int] | None:
        """Return the file with the longest common prefix, of equal ones the shortest."""
        best, order = None, (0, 0)
        with self._lock:
            for name, held in self._listed(shelf).items():
                common = common_prefix(held, ids)
                spared = common - beyond
                pays = spared >= LEAST_REUSE and spared * _READ_PER_ROW >= len(held)
                if pays and (best is None or (common, -len(held)) > order):
                    best, order = (name, common), (common, -len(held))
        return best

    def _listed(self, shelf: _Shelf) -> Mapping[str, Ids]:
        """Return the ids of all usable files; costs one ``stat`` while nothing changes."""
        try:
            changed = shelf.folder.stat().st_mtime_ns
            if changed == shelf.seen:
                return shelf.ids
            shelf.seen = changed if time.time_ns() - changed > _RECENT_NS else -1
            paths = [p for p in shelf.folder.iterdir() if p.suffix == _SUFFIX]
        except OSError:  # nothing was ever warmed, or the disk is gone
            paths = []
        states = {path.name: state for path in paths if (state := _state(path)) is not None}
        new = [name for name, state in states.items() if shelf.states.get(name) != state]
        shelf.ids = {n: held for n, held in shelf.ids.items() if n in states and n not in new}
        shelf.states = states
        for name in new:
            try:
                shelf.ids[name] = prefix_format.read_ids(
                    shelf.folder / name, shelf.key, self._layout
                )
            except _DAMAGE as err:
                _warn(shelf, name, err)
        return shelf.ids

    def _forget(self, shelf: _Shelf, name: str, err: Exception) -> None:
        """Leave a file alone until another takes its name; one that is gone made room for others."""
        with self._lock:
            shelf.ids.pop(name, None)
            if (state := _state(shelf.folder / name)) is not None:
                shelf.states[name] = state
                _warn(shelf, name, err)

    def _make_room(self, nbytes: int) -> None:
        """Remove the files of ours that were used longest ago until ``nbytes`` fit, and what writers left half done."""
        files = []
        for shelf in marked_folders(self._folder):
            if shelf.kind == "kept prompts":
                clear_abandoned(shelf.path)
                files += [(stat.st_mtime, stat.st_size, path) for path, stat in shelf.files()]
        total = sum(size for _, size, _ in files) + nbytes
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                break
            with contextlib.suppress(OSError):  # another process may remove it at the same time
                path.unlink()
                total -= size
        if not self._said_others and (others := foreign(self._folder)):
            self._said_others = True
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            logger.warning(
                "%s holds files that are not kept prompts (%s%s): they are left alone and do not count "
                "against prefix_cache_dir_bytes. A folder of its own is clearer.",
                self._folder, ", ".join(others[:_NAMED]), more,
            )  # fmt: skip


def common_prefix(a: Ids, b: Ids) -> int:
    """Return how many tokens two prompts share from their start on."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _state(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:  # another process has just removed it
        return None
    return stat.st_ino, stat.st_size


def _warn(shelf: _Shelf, name: str, err: Exception) -> None:
    logger.warning("%s is ignored: %s", shelf.folder / name, err)
