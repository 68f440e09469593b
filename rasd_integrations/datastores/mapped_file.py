"""Store files mapped into memory: checked when opened, and before each use."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rasd_integrations.errors import RetrievalError
from rasd_integrations.storage.tensor_file import DTYPES, FileKind, opened, refuse


class StoreKind(NamedTuple):
    """A kind of store file: its title in error messages, and the call that builds such a store."""

    file: FileKind
    title: str
    build: str

    @contextmanager
    def errors(self, path: Path) -> Iterator[None]:
        """Explain what is wrong with the file at ``path``.

        Raises:
            RetrievalError: There is no such file, or it cannot be used.
        """
        try:
            yield
        except (FileNotFoundError, IsADirectoryError) as err:
            msg = f"There is no {self.title} at {path}. Make one: {self.build}."
            raise RetrievalError(msg) from err
        except (OSError, ValueError, OverflowError) as err:
            msg = f"{path} cannot be used as a {self.title}: {err}. Build it again from its texts."
            raise RetrievalError(msg) from err


class MappedFile:
    """A file of named arrays, mapped into memory; it must not change while it is open.

    One that is cut in the very microseconds of a read still ends the process, as any mapped file would; one that
    is replaced does no harm.

    Attributes:
        entries: Its arrays by name.
        marks: The strings in its header.
        bytes: The whole file.
    """

    def __init__(self, path: Path, kind: StoreKind, *, verify: bool = True) -> None:
        """Map ``path``; ``verify`` reads all of it once and compares its checksums.

        Raises:
            OSError: It is missing or cannot be read.
            UnusableFileError: It is damaged or of another kind.
        """
        with opened(path, kind.file) as file:
            if verify:  # read, not mapped, so that it does not stay in memory
                file.verify()
            self._descriptor = os.dup(file.file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self.path, self.entries, self.marks = path, file.entries, file.marks
        self._kind = kind
        self._state_when_opened = self._state()
        # Copied on write, though nothing writes: torch warns about memory that is read-only.
        self.bytes = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)

    def array(self, name: str, dtype: str) -> NDArray[Any]:
        """Return a view of an array, whose type's name in the file must be ``dtype``."""
        entry = self.entries.get(name)
        if entry is None or entry.dtype != dtype:
            refuse(f"it has no {name!r} of type {dtype}")
        flat = np.frombuffer(self.bytes, DTYPES[dtype], math.prod(entry.shape), entry.start)
        return flat.reshape(entry.shape)

    def check(self) -> None:
        """Raise if the file was written to in place; one that was replaced is still the old one here."""
        if self._state() != self._state_when_opened:
            msg = (
                f"The {self._kind.title} {self.path} was changed in place while it was open. Open it again, and "
                f"replace it in one move: {self._kind.build}."
            )
            raise RetrievalError(msg)

    def _state(self) -> tuple[int, int]:
        stat = os.fstat(self._descriptor)
        return stat.st_size, stat.st_mtime_ns
