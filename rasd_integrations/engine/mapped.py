"""Returns memory to the system that holds parts of files, or nothing."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch import nn

_DONTNEED = 4  # of madvise, on Linux
_EACH_S = 0.2
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)\s*(.*)")


class _Mapping(NamedTuple):
    start: int
    end: int
    path: str


def release(model: nn.Module, folder: Path | None) -> None:
    """Drop the pages of mapped weights, and of files in ``folder``, until they are used again.

    A model's weights are read once at load, to compare its steps, and a graph's to be packed. Mapped, they count as the
    process's memory until the system needs it, and so does what glibc keeps of freed memory. Only on Linux, and only
    mappings of which nothing was changed.
    """
    if sys.platform != "linux":
        return
    weights = [weight.data_ptr() for weight in chain(model.parameters(), model.buffers())]
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # musl has none
        libc.malloc_trim(0)
    advise = libc.madvise
    for start, end, path in _unchanged_files():
        within = folder is not None and path.startswith(f"{folder}/")
        if within or any(start <= weight < end for weight in weights):
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


@contextmanager
def releasing(model: nn.Module) -> Iterator[None]:
    """Do so again and again inside the block, in which all weights are read to be packed."""
    ends = threading.Event()

    def run() -> None:
        while not ends.wait(_EACH_S):
            release(model, None)

    thread = threading.Thread(target=run, name="rasd-release", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def _unchanged_files() -> Iterator[_Mapping]:
    """Yield the mappings of files in which no page was written."""
    found: _Mapping | None = None
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # a sandbox without /proc
        return
    for line in lines.splitlines():
        if head := _HEAD.match(line):
            start, end, inode, path = head.groups()
            found = _Mapping(int(start, 16), int(end, 16), path) if int(inode) else None
        elif found is not None and line.split() == ["Anonymous:", "0", "kB"]:
            yield found
