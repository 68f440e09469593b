"""Damages our files of arrays, and forges them with right checksums."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def flip(path: Path, share: float) -> None:
    """Change one bit of a file, at a share of its length."""
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def raw(path: Path, head: bytes) -> None:
    """Write a file of a header alone."""
    path.write_bytes(len(head).to_bytes(8, "little") + head)


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change what a file's header and marks say, and give it right checksums."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    marks, data = header.pop("__metadata__"), content[start:]
    parts = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    change(header, marks)
    kept = b"".join(parts[name] for name in parts if name in header)
    if len(kept) < len(data):  # an array was left out: the others move up
        end = 0
        for name, entry in header.items():
            entry["data_offsets"] = [end, end + len(parts[name])]
            end += len(parts[name])
    said = {"__metadata__": {n: m for n, m in marks.items() if n != "crc32"}, **header}
    marks["crc32"] = f"{zlib.crc32(json.dumps(said, sort_keys=True).encode()):08x}"
    raw(path, json.dumps({"__metadata__": marks, **header}).encode())
    with path.open("ab") as file:
        file.write(kept)


def first(header: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a file's first array."""
    return next(iter(header.values()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "the header's size": lambda p: flip(p, 0.0),
    "a bit": lambda p: flip(p, 0.5),
    "the last bit": lambda p: flip(p, 1.0),
    "cut": lambda p: os.truncate(p, p.stat().st_size // 2),
    "cut in its header": lambda p: os.truncate(p, 100),
    "longer": lambda p: p.write_bytes(p.read_bytes() + b"more"),
    "empty": lambda p: p.write_bytes(b""),
    "no header": lambda p: p.write_bytes(b"\xff" * 4096),
    "other json": lambda p: raw(p, b'{"a": 1}'),
    "a list": lambda p: raw(p, b"[1,2,3] "),
    "a zip": lambda p: p.write_bytes(b"PK\x03\x04" + p.read_bytes()),
    "a pipe": lambda p: (p.unlink(), os.mkfifo(p)),
    "deep json": lambda p: raw(p, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "marks that are a list": lambda p: raw(p, b'{"__metadata__": [1, 2]}'),
    "marks that are numbers": lambda p: raw(p, b'{"__metadata__": {"format": 1}}'),
    "a header without end": lambda p: p.write_bytes(b"\xff" * 7 + b"\x7f" + b"{" * 64),
    "sixteen megabytes of spaces": lambda p: raw(p, b" " * ((1 << 24) - 2) + b"{}"),
    "an endless number": lambda p: raw(p, b'{"a": ' + b"9" * 10_000 + b"}"),
    "nested sums": lambda p: rewrite(p, lambda h, m: m.update(tensors="[" * 100_000)),
    "no sums": lambda p: rewrite(p, lambda h, m: m.pop("tensors")),
    "another format": lambda p: rewrite(p, lambda h, m: m.update(format="x")),
    "another version": lambda p: rewrite(p, lambda h, m: m.update(version="0")),
    "reversed offsets": lambda p: rewrite(p, lambda h, m: first(h)["data_offsets"].reverse()),
    "another type": lambda p: rewrite(p, lambda h, m: first(h).update(dtype="Q8")),
    "another shape": lambda p: rewrite(p, lambda h, m: first(h).update(shape=[999])),
    "an endless shape": lambda p: rewrite(p, lambda h, m: first(h).update(shape=[10**30, -1, 0])),
    "nested entries": lambda p: rewrite(p, lambda h, m: first(h).update(more=[[1]])),
    "the same bytes twice": lambda p: rewrite(
        p, lambda h, m: list(h.values())[1].update(data_offsets=first(h)["data_offsets"])
    ),
}  # fmt: skip
