"""Limits the KV memory of concurrent answers: a FIFO semaphore weighted by bytes."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

from rasd_integrations.errors import DecodingError
from rasd_integrations.process import Bell, locked

_SHARE = 0.5  # of the memory available when a device's gate is made
_UNKNOWN = 8 << 30  # bytes, if the system does not report what is available
_POLL_S = 0.1  # a cancelled request leaves the queue within this time

# The answer that this context runs in. Answers nested in it (a user's drafter or store that calls a model)
# must not wait for it to end.
_inside: ContextVar[weakref.ref[_Place] | None] = ContextVar("rasd_admitted", default=None)


class _Place:
    """A waiting or running answer; held weakly, so that after an interrupt it goes with its frames."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.bell = Bell()


class Admission:
    """Admits answers while the running ones fit in a limit; one is always admitted, however large.

    Only for answers that end by themselves. The consumer of a synchronous stream may ask for another answer in the
    same thread before it ends the first, and would wait for itself.

    Attributes:
        limit: Bytes that the running answers may hold together.
    """

    def __init__(self, limit: int) -> None:
        """Admit up to ``limit`` bytes."""
        self.limit = limit
        self._lock = threading.Lock()  # of both dicts, which keep the order of arrival
        self._live: weakref.WeakKeyDictionary[_Place, None] = weakref.WeakKeyDictionary()
        self._line: weakref.WeakKeyDictionary[_Place, None] = weakref.WeakKeyDictionary()

    @property
    def live(self) -> int:
        """Running answers."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Waiting answers."""
        return len(self._line)

    @contextmanager
    def admit(self, nbytes: int, cancelled: Callable[[], bool] | None = None) -> Iterator[None]:
        """Wait until an answer of ``nbytes`` fits, and count it until the block ends.

        Args:
            nbytes: Size of its keys and values at its end.
            cancelled: Once it returns true, the answer leaves the queue.

        Raises:
            DecodingError: It was cancelled while it waited.
        """
        place = _Place(nbytes)
        around = _inside.get()
        nested = around is not None and around() is not None
        try:
            self._line_up(place)
            while not self._enters(place, nested=nested):
                if cancelled is not None and cancelled():
                    msg = "The request was cancelled while it waited for memory."
                    raise DecodingError(msg)
                place.bell.wait(_POLL_S)
            _inside.set(weakref.ref(place))
            yield
        finally:
            _inside.set(around)
            self._leave(place)

    @locked
    def _line_up(self, place: _Place) -> None:
        self._line[place] = None

    @locked
    def _enters(self, place: _Place, *, nested: bool) -> bool:
        """Admit the answer if it is its turn."""
        room = self.limit - sum(live.nbytes for live in self._live)
        fits = next(iter(self._line)) is place and (not self._live or place.nbytes <= room)
        if fits or nested:
            self._live[place] = None
            del self._line[place]
            self._call_next()
        return fits or nested

    @locked
    def _leave(self, place: _Place) -> None:
        self._live.pop(place, None)
        self._line.pop(place, None)
        self._call_next()

    def _call_next(self) -> None:
        first = next(iter(self._line), None)
        if first is not None:
            first.bell.ring()


@cache
def shared_admission(device: torch.device) -> Admission:
    """Return the gate of ``device``, which all models on it share: half of what is left after loading."""
    return Admission(int(_SHARE * memory_available(device)))


def memory_available(device: torch.device) -> int:
    """Return the available bytes on ``device``: free memory and what caches would release."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + kept)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    rooms = [room for room in (_system_room(), *_cgroup_rooms()) if room is not None]
    return max(min(rooms, default=_UNKNOWN), 0)


def _system_room() -> int | None:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(AttributeError, OSError, ValueError):  # not Linux: take half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _cgroup_rooms(proc: Path = Path("/proc"), root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Yield the free memory of each cgroup limit on this process."""
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                mount, limit, usage = root, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                mount, limit, usage = (
                    root / "memory",
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                )
            else:
                continue
            # Inside a container its own group is often mounted as the root.
            for folder in (mount / path.lstrip("/"), mount):
                with suppress(OSError, ValueError):
                    used = int((folder / usage).read_text(encoding="ascii"))
                    yield (
                        int((folder / limit).read_text(encoding="ascii"))
                        - used
                        + _reclaimable(folder)
                    )


def _reclaimable(folder: Path) -> int:
    stat = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
