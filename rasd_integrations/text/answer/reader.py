"""Reading a text that is still being written, as if all of it were there."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import TypeVar

_T = TypeVar("_T")
Reading = Generator[None, None, _T]
"""A step of reading; each ``yield`` asks for more of the text."""

BLANK = " \t\r\n"
_IN_STRING = re.compile(r'[^"\\]+')
_IN_VALUE = re.compile(r'[^"{}\[\],<\s]+')


class TextReader:
    """The part of a text that has come and is not decided yet, and how far into it reading is.

    Attributes:
        buffer: The undecided text.
        at: What stands before it in the buffer is read.
        ended: No more text comes.
        passing: What is read from here on is decided at once, and goes to this list.
    """

    def __init__(self) -> None:
        """Start before any text."""
        self.buffer = ""
        self.at = 0
        self.ended = False
        self.passing: list[str] | None = None

    def take(self, end: int | None = None) -> str:
        """Return the buffer up to ``end`` (all that is read by default), and drop it."""
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
        """Return which of ``marks`` stands next; empty if none does."""
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
        """Step over ``mark``, and return whether it stood next."""
        found = bool(mark) and bool((yield from self.next_in((mark,))))
        self.at += len(mark) if found else 0
        return found

    def skip(self, characters: str = BLANK) -> Reading[None]:
        """Step over all that is in ``characters``."""
        while (char := (yield from self.peek())) and char in characters:
            self.at += 1

    def skip_over(self, pattern: re.Pattern[str]) -> Reading[None]:
        """Step over characters that match ``pattern``, a class of characters with ``+``."""
        while (yield from self.peek()) and (found := pattern.match(self.buffer, self.at)):
            self.at = found.end()

    def pass_until(self, marks: tuple[str, ...], blank: str, out: list[str]) -> Reading[bool]:
        """Take text to ``out`` up to the first of ``marks``, and step over that; false without one.

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
        """Read a JSON string; false where the text ends inside it."""
        self.at += 1
        while char := (yield from self.peek()):
            if char == '"':
                self.at += 1
                return True
            if char == "\\":
                self.at += 1
                escaped = yield from self.peek()  # which may move the place that is read
                self.at += len(escaped)
            else:
                yield from self.skip_over(_IN_STRING)
        return False

    def value(self, ends: tuple[str, ...]) -> Reading[bool]:
        """Read a JSON value; false where the text, or one of ``ends`` outside of strings, cuts it off.

        What stands between its brackets and strings is not looked at.
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
        """Read all up to the first of ``ends``; always false, as nothing whole was read."""
        while (yield from self.peek()) and not (yield from self.next_in(ends)):
            self.at += 1
        return False

    def pass_on(self) -> None:
        """Take what is read to :attr:`passing`, if it goes there."""
        if self.passing is not None and self.at:
            self.passing.append(self.take())

    def _more(self) -> Reading[None]:
        self.pass_on()
        yield

    def _begun(self, marks: tuple[str, ...]) -> int:
        """Return how much of the buffer's end may be the beginning of a mark."""
        lengths = (
            n for mark in marks for n in range(1, len(mark)) if self.buffer.endswith(mark[:n])
        )
        return max(lengths, default=0)


def json_text(token: str) -> str:
    """Return the text of a JSON string; empty where it is none."""
    try:
        value = json.loads(token, strict=False)
    except ValueError:
        return ""
    return value if isinstance(value, str) else ""
