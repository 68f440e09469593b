"""Tokens as bytes, incomplete characters included.

Byte-level tokenizers (GPT-2, Llama 3, Qwen, SmolLM) and sentencepiece ones (Llama 2, Mistral, Gemma) write the same
text in different symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rasd_integrations.text.tool_formats import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Spaces, line ends and characters of one to four bytes: a tokenizer that rewrites any of them is not read.
_PROBE = "\nA probe,  of 12 words:\n\n\tna\u00efve \u6771\u4eac \u0436 \U0001f989 (ok).\r\n  Ok"

_PRINTABLE = (
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
)  # GPT-2 writes these bytes as they are
_BYTES = {chr(b): b for b in _PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}


def token_reader(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], bytes] | None:
    """Return what gives the bytes of an id: of an added token its name, of an unknown id none.

    ``None`` if the tokens do not join to the text they were made from, read as byte-level or as sentencepiece.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    added = added_tokens(tokenizer)
    # Not through the tokenizer: its calls change settings that other threads may be reading.
    probe = backend.encode(_PROBE, add_special_tokens=False).ids
    for symbol_bytes in (_byte_level, _sentencepiece):

        def read(token_id: int, symbol_bytes: Any = symbol_bytes) -> bytes:
            token = backend.id_to_token(token_id) or ""
            return token.encode() if token_id in added else symbol_bytes(token) or b""

        if b"".join(map(read, probe)).removeprefix(b" ") == _PROBE.encode():
            return read
    return None


def fallback_byte(token: str) -> int | None:
    """Return the byte of a token such as ``<0x41>``."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(token[3:5], 16)
    return None


def _byte_level(token: str) -> bytes | None:
    """Undo GPT-2's printable form of bytes."""
    return bytes(map(_BYTES.__getitem__, token)) if _BYTES.keys() >= set(token) else None


def _sentencepiece(token: str) -> bytes:
    byte = fallback_byte(token)
    return token.replace("\u2581", " ").encode() if byte is None else bytes([byte])
