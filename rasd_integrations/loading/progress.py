"""Progress of a slow first load on standard error: a bar on a terminal, one line elsewhere.

Silent for the first two seconds, after ``transformers.utils.logging.disable_progress_bar()``, and with
``HF_HUB_DISABLE_PROGRESS_BARS=1`` in the environment.
"""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging

DELAY_S = 2.0
_REDRAW_S = 0.2
_COLUMNS = 80
_COUNTED = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
_UNCOUNTED = "{desc}: {elapsed}"


class Stage:
    """One slow stage of a load.

    Attributes:
        done: Completed items of ``total``.
        total: ``None`` if there is nothing to count; the bar then shows the time only.
    """

    def __init__(self, what: str) -> None:
        """Start a thread that shows progress after :data:`DELAY_S`."""
        self.done = 0
        self.total: int | None = None
        self._what = what
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="rasd-progress", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Remove the bar."""
        self._over.set()
        self._thread.join()

    def _show(self) -> None:
        if self._over.wait(DELAY_S) or sys.stderr is None:
            return
        if not sys.stderr.isatty():
            print(f"{self._what} ...", file=sys.stderr, flush=True)  # noqa: T201 -- progress, not a log
            return
        size = shutil.get_terminal_size()  # tqdm draws nothing on terminals that report 0 by 0
        with tqdm(
            desc=self._what,
            file=sys.stderr,
            leave=False,
            ncols=min(size.columns, _COLUMNS),
            nrows=size.lines,
            bar_format=_UNCOUNTED,
        ) as bar:
            while not self._over.wait(_REDRAW_S):
                bar.total, bar.n = self.total, self.done
                bar.bar_format = _COUNTED if self.total else _UNCOUNTED
                bar.refresh()


@contextmanager
def stage(what: str | None) -> Iterator[Stage | None]:
    """Show ``what`` once it has taken two seconds; ``None`` shows nothing."""
    if what is None or not logging.is_progress_bar_enabled():
        yield None
        return
    shown = Stage(what)
    try:
        yield shown
    finally:
        shown.end()


@contextmanager
def transformers_stage(what: str | None) -> Iterator[None]:
    """Show one stage in place of transformers' own bars of this thread.

    The caller holds ``LOADING``, as the hook for bars is global to the process.
    """
    owner = threading.get_ident()
    with stage(what) as shown:

        def make(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if threading.get_ident() == owner:
                return _Counter(shown, *args, **kwargs)
            return factory(*args, **kwargs) if before is None else before(factory, args, kwargs)

        before = logging.set_tqdm_hook(make)
        reader: Any = modeling_gguf_pytorch_utils  # uses tqdm directly, not the hook
        theirs = getattr(reader, "tqdm", tqdm)
        reader.tqdm = lambda *args, **kwargs: make(theirs, args, kwargs)
        try:
            yield
        finally:
            reader.tqdm = theirs
            logging.set_tqdm_hook(before)


class _Counter(logging.EmptyTqdm):
    """Replaces a bar of transformers and counts for a stage."""

    def __init__(
        self, shown: Stage | None, iterable: Any = None, *, total: int | None = None, **_: Any
    ) -> None:
        self._shown = shown
        self._items = iterable
        if shown is not None:
            shown.done = 0
            shown.total = len(iterable) if total is None and hasattr(iterable, "__len__") else total

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            yield item
            self.update()

    def update(self, n: int = 1) -> None:
        if self._shown is not None:
            self._shown.done += n
