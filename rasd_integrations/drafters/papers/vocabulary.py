"""Tokens as bytes, which two vocabularies can be compared by.

Byte-level tokenizers (GPT-2, Llama 3, Qwen, SmolLM) and sentencepiece ones (Llama 2, Mistral, Gemma) write the same
text in different symbols. As bytes, tokens can be compared, joined and cut, incomplete characters included.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from rasd_integrations.errors import VocabularyMismatchError
from rasd_integrations.text.prompt.encoding import Continuation
from rasd_integrations.text.token_bytes import fallback_byte, token_reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_BEHIND = 12  # tokens that are encoded again with what follows them


class Vocabulary:
    """The tokens of one tokenizer as bytes. Safe to use from many threads.

    Attributes:
        texts: Bytes of each id: of a special token its name, of padding nothing.
        ids: Id of each text; of several the one that models use.
        special: Ids without text.
        bos: Ids that the tokenizer writes before a text: its begin-of-sequence id, or none.
        eos: The tokenizer's end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, size: int) -> None:
        """Read the tokens of a model.

        Args:
            tokenizer: The model's own.
            name: The model's, for messages.
            size: Size of the model's vocabulary, padding included.

        Raises:
            VocabularyMismatchError: Its tokens do not join to the text they were made from.
        """
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        marked = {i for i, token in added.items() if token.special}
        self.special = frozenset(marked | set(tokenizer.all_special_ids))
        self._backend = backend
        vocab = {token: i for token, i in tokenizer.get_vocab().items() if i < size}
        read = token_reader(tokenizer)
        if read is None:
            msg = (
                f"The tokens of {name!r} cannot be read as text: they are neither byte-level nor "
                f"sentencepiece, or the tokenizer rewrites text. Use a drafter of the target's family, "
                f"'self', or 'auto'."
            )
            raise VocabularyMismatchError(msg)
        self._read(vocab, read, size)
        self._singles = {text[0]: i for text, i in self.ids.items() if len(text) == 1}
        self._continuation = Continuation(self._plain)
        self.eos: int | None = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []

    def join(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of ``ids``; special tokens are written by name."""
        return b"".join(map(self.texts.__getitem__, ids))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt; the names of special tokens in it become these tokens."""
        return [*self.bos, *self._plain(text)]

    def encode(self, data: bytes) -> list[int]:
        """Return the ids of a text in the middle of another; invalid UTF-8 becomes byte tokens."""
        ids: list[int] = []
        while data:
            try:
                text, broken, data = data.decode(), b"", b""
            except UnicodeDecodeError as err:
                text, broken = data[: err.start].decode(), data[err.start : err.end]
                data = data[err.end :]
            ids += self._continuation.encode(text, self._plain) if text else ()
            ids += (self._singles[byte] for byte in broken if byte in self._singles)
        return ids

    def extend(self, ids: Sequence[int], data: bytes) -> tuple[int, list[int]]:
        """Append ``data`` to ``ids`` as the tokenizer would, with the last few tokens encoded again.

        Returns:
            How many of ``ids`` stay, and the ids that follow them.
        """
        start = self._border(ids)
        return start, self.encode(self.join(ids[start:]) + data)

    def follow(self, ids: Sequence[int], data: bytes) -> list[int]:
        """Return the ids of ``data`` after ``ids``, all of which stay as they are."""
        start, new = self.extend(ids, data)
        border = len(self.join(ids[start:]))
        offsets = list(accumulate((len(self.texts[i]) for i in new), initial=0))
        return new[offsets.index(border) :] if border in offsets else self.encode(data)

    def _border(self, ids: Sequence[int]) -> int:
        """Return where encoding again may begin: a word's start among the last tokens, after special ones."""
        start = len(ids)
        while start > max(len(ids) - _LOOK_BEHIND, 0) and ids[start - 1] not in self.special:
            start -= 1
        if start == 0 or ids[start - 1] in self.special:
            return start
        words = (i for i in range(start, len(ids)) if self.texts[ids[i]][:1].isspace())
        return next(words, start)

    def _read(self, vocab: dict[str, int], read: Callable[[int], bytes], size: int) -> None:
        """Fill the tables."""
        self.texts = [b""] * size
        for i in vocab.values():
            self.texts[i] = read(i)
        # Of two tokens for the same text models use the one that is no byte token.
        bytewise = {i for token, i in vocab.items() if fallback_byte(token) is not None}
        plain = [i for i, text in enumerate(self.texts) if text and i not in self.special]
        self.ids = {self.texts[i]: i for i in sorted(plain, key=lambda i: (i not in bytewise, -i))}

    def _plain(self, text: str) -> list[int]:
        # Not through the tokenizer: its calls change settings that other threads may be reading.
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def unfinished(data: bytes) -> int:
    """Return how many bytes at the end of ``data`` begin an incomplete character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[-3:] if data[-3:].isascii() else data)
    return len(decoder.getstate()[0])
