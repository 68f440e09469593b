"""Token ids to text, as they come: the join of the pieces is the text of the whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
# A character has at most four bytes, so the last four tokens hold the last character whole; a window
# that starts with them decodes its end as the whole answer would, whatever its first token loses
# (the leading space of sentencepiece).
_CONTEXT_TOKENS = 4


class IncrementalDetokenizer:
    """Decode a stream of token ids at a cost that grows with the new tokens only.

    The join of everything returned is ``tokenizer.decode(all, skip_special_tokens=True)``, without the
    clean-up of spaces that some tokenizers ask for (it would change code and quoted text).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kept: Collection[str] = (),
        marks: Mapping[int, str] | None = None,
    ) -> None:
        """Start an empty text.

        Args:
            tokenizer: The model's own.
            kept: Control tokens that are written out.
            marks: What is written for other control tokens, by id; those not named are left out.
        """
        self._tokenizer = tokenizer
        self._marks = dict(marks or {})
        ids: Any = tokenizer.convert_tokens_to_ids(list(kept))
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        control = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        self._skipped = frozenset(control) - frozenset(ids)
        self._byte_ids = _byte_fallback_ids(tokenizer)
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were returned

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that ``ids`` complete; bytes of an unfinished character are held back."""
        for place, token in enumerate(ids):
            if token in self._marks and token in self._skipped:
                before, mark = self.push(ids[:place]), self._marks[token]
                return f"{before}{mark}{self.push(ids[place + 1 :])}"
        self._window.extend(i for i in ids if i not in self._skipped)
        # A run of byte-fallback tokens decodes as one: a single invalid byte spoils all of it, so it
        # is read only when another token ends it.
        end = len(self._window)
        while end and self._window[end - 1] in self._byte_ids:
            end -= 1
        text = self._decode(self._window[:end])
        unfinished = text.endswith(_REPLACEMENT)
        piece = self._take(text[: len(text) - unfinished])
        if end == len(self._window) and not unfinished:
            del self._window[:-_CONTEXT_TOKENS]
            self._sent = len(self._decode(self._window))
        return piece

    def flush(self) -> str:
        """Return what was held back; the text is then at its end."""
        return self._take(self._decode(self._window))

    def _take(self, text: str) -> str:
        piece = text[self._sent :]
        self._sent = max(self._sent, len(text))
        return piece

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        return str(
            self._tokenizer.decode(
                # Those to be skipped were left out when they came.
                ids,
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )


def _byte_fallback_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids: Any = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return frozenset(ids) - {None, tokenizer.unk_token_id}
