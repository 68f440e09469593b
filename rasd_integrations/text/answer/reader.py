"""A reader for streamed text; its generators pause when they need more of it."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")
Reading = Generator[None, None, _T]
"""A read operation; each ``yield`` asks for more text."""

BLANK = " \t\r\n"
_IN_STRING = re.compile(r'[^"\\]+')
_IN_VALUE = re.compile(r'[^"{}\[\],<\s]+')


class TextReader:
    """The buffer of streamed text that is not classified yet, with a read position.

    Attributes:
        buffer: The unclassified text.
        at: Read position in the buffer.
        ended: No more text comes.
        passing: If set, text goes to this list as soon as it is read.
    """

    def __init__(self) -> None:
        """Start with an empty buffer."""
        self.buffer = ""
        self.at = 0
        self.ended = False
        self.passing: list[str] | None = None

    def take(self, end: int | None = None) -> str:
        """Remove and return the buffer up to ``end`` (default: up to the read position)."""
        end = self.at if end is None else end
        text, self.buffer = self.buffer[:end], self.buffer[end:]
        self.at = max(0, self.at - end)
        return text

    def peek(self) -> Reading[str]:
        """Return the next character; empty at the end of the text."""
        while self.at == len(self.buffer) and not self.ended:
            yield from self._more()
        return self.buffer[self.at : self.at + 1]

    def next_in(self, marks: tuple[str, ...]) -> Reading[str]:
        """Return the one of ``marks`` that comes next, or an empty string."""
        longest = max(map(len, marks), default=0)
        while True:
            for mark in marks:
                if self.buffer.startswith(mark, self.at):
                    return mark
            rest = self.buffer[self.at : self.at + longest]
            if self.ended or not any(mark.startswith(rest) for mark in marks):
                return ""
            yield from self._more()

    def step_over(self, mark: str) -> Reading[bool]:
        """Skip ``mark`` if it comes next, and return True if it did."""
        found = bool(mark) and bool((yield from self.next_in((mark,))))
        self.at += len(mark) if found else 0
        return found

    def skip(self, characters: str = BLANK) -> Reading[None]:
        """Skip all ``characters``."""
        while (char := (yield from self.peek())) and char in characters:
            self.at += 1

    def skip_over(self, pattern: re.Pattern[str]) -> Reading[None]:
        """Skip characters that match ``pattern``, a character class with ``+``."""
        while (yield from self.peek()) and (found := pattern.match(self.buffer, self.at)):
            self.at = found.end()

    def pass_until(self, marks: tuple[str, ...], blank: str, out: list[str]) -> Reading[bool]:
        """Move text to ``out`` up to the first of ``marks`` and skip that; False without one.

        Characters of ``blank`` before the mark stay in the buffer with it: they are text if the mark is.
        """
        while True:
            found = [(at, mark) for mark in marks if (at := self.buffer.find(mark)) >= 0]
            end, mark = min(found, default=(len(self.buffer), ""))
            if mark or not self.ended:
                end -= 0 if mark else self._begun(marks)
                kept = len(self.buffer[:end].rstrip(blank))
            else:
                kept = end
            out.append(self.take(kept))
            if mark or self.ended:
                self.at = end - kept + len(mark)
                return bool(mark)
            yield

    def string(self) -> Reading[bool]:
        """Read a JSON string; False if the text ends inside it."""
        self.at += 1
        while char := (yield from self.peek()):
            if char == '"':
                self.at += 1
                return True
            if char == "\\":
                self.at += 1
                escaped = yield from self.peek()  # may move the read position
                self.at += len(escaped)
            else:
                yield from self.skip_over(_IN_STRING)
        return False

    def value(self, ends: tuple[str, ...]) -> Reading[bool]:
        """Read a JSON value; False if the text, or one of ``ends`` outside strings, cuts it off.

        Anything between brackets and strings is accepted.
        """
        depth = 0
        while char := (yield from self.peek()):
            if char == '"':
                if not (yield from self.string()):
                    return False
                if not depth:
                    return True
            elif not depth and char in ",}]" + BLANK:
                return True  # the end of a number or word
            elif (yield from self.next_in(ends)):
                return False
            elif found := _IN_VALUE.match(self.buffer, self.at):
                self.at = found.end()
            else:
                depth += (char in "{[") - (char in "}]")
                self.at += 1
                if not depth and char in "}]":
                    return True
        return False

    def rest(self, ends: tuple[str, ...]) -> Reading[bool]:
        """Read up to the first of ``ends``; always False, as no whole value was read."""
        while (yield from self.peek()) and not (yield from self.next_in(ends)):
            self.at += 1
        return False

    def pass_on(self) -> None:
        """Move the read text to :attr:`passing`, if that is set."""
        if self.passing is not None and self.at:
            self.passing.append(self.take())

    def _more(self) -> Reading[None]:
        self.pass_on()
        yield

    def _begun(self, marks: tuple[str, ...]) -> int:
        """Return the length of the buffer's end that may begin a mark."""
        lengths = (
            n for mark in marks for n in range(1, len(mark)) if self.buffer.endswith(mark[:n])
        )
        return max(lengths, default=0)


def json_text(token: str) -> str:
    """Return the text of a JSON string; empty if it is not one."""
    try:
        value = json.loads(token, strict=False)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
