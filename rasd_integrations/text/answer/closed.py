"""Names the values of a JSON answer that the grammar closed at ``max_tokens``."""

from __future__ import annotations

import re

_WRAPPED = ("arguments.", "parameters.")
_PART = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s"{}\[\],:]+')


def closed_fields(text: str, kept: int) -> tuple[str, ...]:
    """Return the paths of the innermost values that end after ``kept`` characters.

    Args:
        text: A complete answer that contains one JSON object, perhaps within a tool call's markup.
        kept: Characters written before closing began.
    """
    found: dict[str, None] = {}
    stack: list[
        list[str]
    ] = []  # per open object or list: bracket, key or index of the current value
    keyed = False
    for match in _PART.finditer(text, max(text.find("{"), 0)):
        part = match[0]
        if part in "{[":
            stack.append([part, "" if part == "{" else "0"])
            keyed = part == "["
        elif part == ",":
            if stack and stack[-1][0] == "[":
                stack[-1][1] = str(int(stack[-1][1]) + 1)
            keyed = bool(stack) and stack[-1][0] == "["
        elif part == ":":
            keyed = True
        elif part in "}]":
            if not stack:
                break
            stack.pop()
            keyed = True
        elif stack and not keyed:
            stack[-1][1] = part[1:-1]
            continue
        if part not in "{[,:" and stack and match.end() > kept:
            path = ".".join(key for _, key in stack)
            if not any(name.startswith(f"{path}.") for name in found):
                found[path] = None
        if part in "}]" and not stack:
            break
    return tuple(_bare(path) for path in found)


def _bare(path: str) -> str:
    return next((path.removeprefix(w) for w in _WRAPPED if path.startswith(w)), path)
