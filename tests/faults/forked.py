"""Run an action in a process of its own that may crash, hang or be killed, and say how it ended.

Processes are forked from a parent that has imported everything and run nothing, so that one costs milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rasd_integrations.errors import RASDError

CONTEXT = multiprocessing.get_context("fork")
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Said:
    """How a process ended.

    Attributes:
        value: What the action returned; ``None`` after an error.
        error: Name and text of the exception, or what became of a process that said nothing.
        ours: The exception is one of the package's.
    """

    value: Any = None
    error: str = ""
    ours: bool = False


@dataclass(slots=True)
class Row:
    """What became of one case: the line of the table.

    Attributes:
        case: Its name.
        runs: How often it was tried.
        wrong: Answers that differ, or that a cache's trouble failed.
        lost: Files of the user, or whole files of ours, that were there before and are gone or changed.
        foreign: Exceptions that are not the package's, hangs and aborts.
        refused: Errors of ours where one is in order.
        notes: The first few things that went wrong.
    """

    case: str
    runs: int = 0
    wrong: int = 0
    lost: int = 0
    foreign: int = 0
    refused: int = 0
    notes: list[str] = field(default_factory=list)

    def judge(self, said: Said, expected: Any, *, may_refuse: bool = False) -> None:
        """Count one run; ``may_refuse``: an error of ours is a right end, too."""
        self.runs += 1
        if said.error and not said.ours:
            self.foreign += 1
            self.notes.append(said.error)
        elif said.error and may_refuse:
            self.refused += 1
        elif said.error or said.value != expected:
            self.wrong += 1
            self.notes.append(said.error or f"{said.value!r} instead of {expected!r}"[:300])


def start(action: Callable[..., Any], *args: Any) -> tuple[BaseProcess, Connection]:
    """Fork a process that sends what ``action`` returns or raises."""
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_run, args=(theirs, action, args))
    process.start()
    theirs.close()
    return process, ours


def finish(process: BaseProcess, ours: Connection, timeout: float = TIMEOUT_S) -> Said:
    """Wait for the end of a process; one that hangs is killed."""
    try:
        said = ours.recv() if ours.poll(timeout) else Said(error=f"hung for {timeout:.0f} s")
    except EOFError:
        process.join(timeout)
        said = Said(error=f"ended with exit code {process.exitcode} and said nothing")
    if said.error.startswith("hung"):
        process.kill()
    process.join()
    return said


def run(action: Callable[..., Any], *args: Any) -> Said:
    """Run ``action`` in a process of its own."""
    return finish(*start(action, *args))


def killed(action: Callable[..., Any], seconds: float, *args: Any) -> None:
    """Start ``action`` and end it by SIGKILL after ``seconds``, wherever it is."""
    process, ours = start(action, *args)
    time.sleep(seconds)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    ours.close()


def _run(theirs: Connection, action: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        said = Said(action(*args))
    except RASDError as err:
        said = Said(error=f"{type(err).__name__}: {err}"[:300], ours=True)
    except BaseException as err:  # noqa: BLE001 - to say what came is the purpose
        where = traceback.extract_tb(err.__traceback__)[-1]
        said = Said(
            error=f"{type(err).__name__}: {err} ({Path(where.filename).name}:{where.lineno})"[:300]
        )
    theirs.send(said)
    theirs.close()
