"""Reads the chunks of an answer that a server streams."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

from rasd_integrations.errors import ServerError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import FinishReason, TextDelta, ToolCallDelta, WrittenLogprob

REMOTE = "remote"
"""``DecodingStats.mode`` of a server that tells nothing of its decoding."""


class Reply:
    """One streamed answer, of the chat endpoint or of the one for plain texts."""

    def __init__(self, address: str) -> None:
        """Start to read the answer of the server at ``address``."""
        self._address = address
        self._started = time.perf_counter()
        self._reason: str | None = None
        self._own: Mapping[str, Any] | None = None
        self._usage: Mapping[str, Any] = {}
        self._calls: dict[Any, _Call] = {}  # by the server's index

    def push(self, event: Any) -> TextDelta | None:
        """Return what a chunk adds to the answer; ``None``: nothing.

        Raises:
            ServerError: It is no chunk of an answer.
        """
        if not isinstance(event, Mapping):
            raise self._broken(event)
        self._usage = event.get("usage") or self._usage
        choices = event.get("choices") or ()
        if not choices:
            return None
        choice = choices[0] if isinstance(choices, Sequence) else None
        if not isinstance(choice, Mapping):
            raise self._broken(choices)
        delta = choice.get("delta") or {}
        if not isinstance(delta, Mapping):
            raise self._broken(delta)
        self._reason = choice.get("finish_reason") or self._reason
        self._own = choice.get("rasd") or self._own
        text = self._text(delta.get("content") or delta.get("refusal") or choice.get("text"))
        thought = self._text(delta.get("reasoning_content") or delta.get("reasoning"))
        calls = tuple(self._call(call) for call in delta.get("tool_calls") or ())
        logprobs = self._logprobs(choice.get("logprobs"))
        if not (text or thought or calls or logprobs):
            return None
        return TextDelta(text, reasoning=thought, tool_calls=calls, logprobs=logprobs)

    def end(self) -> TextDelta:
        """Return the last piece, with the statistics.

        Raises:
            ServerError: The server ended the stream in the middle of the answer.
        """
        if self._reason is None:
            msg = (
                f"{self._address} ended the stream before the answer's end. See its log; ask again."
            )
            raise ServerError(msg)
        stats, reason = self._stats(), self._reason
        if reason == "function_call" or (reason == "stop" and self._calls):
            reason = "tool_calls"  # forced calls end with "stop" at OpenAI and vLLM
        if reason not in get_args(FinishReason):
            stats.faults = (*stats.faults, f"the server ended the answer: {reason}")
            reason = "stop"
        return TextDelta("", finish_reason=cast("FinishReason", reason), stats=stats)

    def _stats(self) -> DecodingStats:
        if self._own is not None:
            return DecodingStats.of(self._own)
        used = self._usage
        read, written = (used.get(f"{n}_tokens_details") or {} for n in ("prompt", "completion"))
        return DecodingStats(
            mode=REMOTE,
            prompt_tokens=used.get("prompt_tokens") or 0,
            cached_prompt_tokens=read.get("cached_tokens") or 0,
            generated_tokens=used.get("completion_tokens") or 0,
            reasoning_tokens=written.get("reasoning_tokens") or 0,
            total_s=time.perf_counter() - self._started,
        )

    def _call(self, given: Any) -> ToolCallDelta:
        function = (given.get("function") if isinstance(given, Mapping) else None) or {}
        if not isinstance(function, Mapping) or not isinstance(given, Mapping):
            raise self._broken(given)
        key = given.get("index", given.get("id"))
        call = self._calls.setdefault(key, _Call(len(self._calls)))
        return call.piece(
            given.get("id"), self._text(function.get("name")), self._text(function.get("arguments"))
        )

    def _logprobs(self, given: Any) -> tuple[WrittenLogprob, ...]:
        if not isinstance(given, Mapping):
            return ()
        if "tokens" in given:  # the endpoint of plain texts has lists side by side
            tops = given.get("top_logprobs") or [None] * len(given["tokens"])
            entries = [
                _entry(token, logprob)
                | {"top_logprobs": [_entry(*pair) for pair in (top or {}).items()]}
                for token, logprob, top in zip(
                    given["tokens"], given["token_logprobs"], tops, strict=False
                )
            ]
        else:
            entries = [{"top_logprobs": [], **entry} for entry in given.get("content") or ()]
        return tuple(WrittenLogprob(entry) for entry in entries)

    def _text(self, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        raise self._broken(value)

    def _broken(self, found: Any) -> ServerError:
        msg = f"{self._address} sent {repr(found)[:80]} in a streamed answer, which is not OpenAI's format."
        return ServerError(msg)


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


class _Call:
    """A tool call as it grows; id and name are told once, with its first piece."""

    def __init__(self, index: int) -> None:
        self._index, self._is_new = index, True

    def piece(self, given_id: Any, name: str, arguments: str) -> ToolCallDelta:
        if not self._is_new:
            return ToolCallDelta(self._index, arguments=arguments)
        self._is_new = False
        return ToolCallDelta(self._index, given_id or f"call_{uuid.uuid4().hex}", name, arguments)
