"""Interrupts at chosen lines: what Ctrl-C does at the worst of moments, made to happen."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

Place = tuple[str, str, int, int]
"""File, function, line, and the how manyeth time that it is reached."""


class Tracer:
    """Runs a function in this thread and raises ``KeyboardInterrupt`` before one line of it, or at none.

    Attributes:
        reached: Every place that was reached, in order.
        interrupted: Whether the interrupt was raised.
    """

    def __init__(self, *modules: ModuleType) -> None:
        self.files = {module.__file__ for module in modules}
        self.reached: list[Place] = []
        self.interrupted = False

    def run(self, function: Callable[[], Any], at: Place | None = None) -> Any:
        times: Counter[tuple[str, str, int]] = Counter()

        def local(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line":
                line = (frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno)
                times[line] += 1
                place = (*line, times[line])
                self.reached.append(place)
                if place == at:
                    self.interrupted = True
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return local

        def call(frame: FrameType, event: str, arg: object) -> Any:
            return local if frame.f_code.co_filename in self.files else None

        before = sys.gettrace()
        sys.settrace(call)
        try:
            return function()
        finally:
            sys.settrace(before)
