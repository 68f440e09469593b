"""Log-probabilities of tokens as OpenAI asks for and reports them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rasd_integrations.config import check_value
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.text.token_bytes import token_reader
from rasd_integrations.types import TokenLogprob, WrittenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def num_alternatives(logprobs: bool | None, top_logprobs: int | None) -> int | None:
    """Return ``SamplingParams.top_logprobs`` for OpenAI's two options.

    Raises:
        ConfigurationError: ``logprobs`` is no truth value, or alternatives are asked for without it.
    """
    known = logprobs is None or isinstance(logprobs, bool)
    check_value(known, "logprobs", logprobs, "True, False or None")
    if logprobs:
        return 0 if top_logprobs is None else top_logprobs
    if top_logprobs not in (None, 0):
        msg = f"top_logprobs is {top_logprobs!r}, but logprobs is {logprobs}. Set logprobs=True, or leave it out."
        raise ConfigurationError(msg)
    return None


def openai_logprobs(
    tokenizer: PreTrainedTokenizerBase, logprobs: Sequence[TokenLogprob | WrittenLogprob]
) -> list[dict[str, Any]]:
    """Return OpenAI's entries: ``token``, ``logprob``, ``bytes`` and ``top_logprobs``.

    ``bytes`` are the token's own, also if they are a part of a character, which ``token`` shows as U+FFFD. Control
    tokens are written by name; ids that the tokenizer does not know are empty. What a server wrote stays as it is.
    """
    read = token_reader(tokenizer)

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = str(tokenizer.decode([token_id])).encode() if read is None else read(token_id)
        return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}

    return [
        dict(one.entry)
        if isinstance(one, WrittenLogprob)
        else entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*pair) for pair in one.top]}
        for one in logprobs
    ]
