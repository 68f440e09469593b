"""Incremental detokenizer: the pieces joined equal the decoded whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rasd_integrations.text.tool_formats import added_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"


class IncrementalDetokenizer:
    """Decodes a stream of token ids in time linear in the new tokens.

    All pieces joined are ``tokenizer.decode(all, skip_special_tokens=True)`` without the clean-up of
    spaces that some tokenizers ask for (it would change code and quotes).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kept: Collection[str] = (),
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """Start with empty text.

        Args:
            tokenizer: The model's own.
            kept: Control tokens that are written as text.
            marks: What is written for other control tokens, by id; the rest are skipped.
        """
        self._tokenizer = tokenizer
        self._marks = dict(marks or {})
        ids: Any = tokenizer.convert_tokens_to_ids(list(kept))
        added = added_tokens(tokenizer).items()
        control = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        self._skipped = frozenset(control) - frozenset(ids)
        self._byte_ids = _byte_fallback_ids(tokenizer)
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were returned

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that ``ids`` complete, without an incomplete last character."""
        for i, token in enumerate(ids):
            if token in self._marks and token in self._skipped:
                before, mark = self.push(ids[:i]), self._marks[token]
                return f"{before}{mark}{self.push(ids[i + 1 :])}"
        self._window.extend(i for i in ids if i not in self._skipped)
        # A run of byte-fallback tokens decodes as one, and one invalid byte spoils all of it: it is
        # decoded only when another token ends it.
        end = len(self._window)
        while end and self._window[end - 1] in self._byte_ids:
            end -= 1
        text = self._decode(self._window[:end])
        unfinished = text.endswith(_REPLACEMENT)
        piece = self._take(text[: len(text) - unfinished])
        if end == len(self._window) and not unfinished:
            del self._window[:-1]  # a decoder may drop the leading space of its first token
            self._sent = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """Return the held-back text; the answer has ended."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        options: Any = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode(ids, **options))


def _byte_fallback_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids: Any = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return frozenset(ids) - {None, tokenizer.unk_token_id}
