"""Answers as OpenAI's objects, plain JSON; a choice has our statistics under ``rasd``."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rasd_integrations.errors import (
    ConfigurationError,
    ContextOverflowError,
    DeviceMemoryError,
    ModelLoadError,
    PromptError,
    RASDError,
    ServerError,
)
from rasd_integrations.runtime.pipeline import joined
from rasd_integrations.serving.wire import OWN
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Generation, TextDelta, TokenLogprob, ToolCall, WrittenLogprob

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """What all parts of an answer have in common.

    Attributes:
        model: As it is served.
        chat: The answer is to messages.
        entries: Returns OpenAI's entries of tokens with log-probabilities.
    """

    model: str
    chat: bool
    entries: Callable[[Sequence[TokenLogprob | WrittenLogprob]], list[Json]]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Sequence[TextDelta]], prompts: int) -> Json:
        """Return the object of a request that is not streamed; ``prompts`` were asked for in it."""
        made = [joined(deltas) for deltas in answers]
        choices = [self._choice(number, answer) for number, answer in enumerate(made)]
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, choices) | {"usage": usage([a.stats for a in made], prompts)}

    def first(self, number: int) -> Iterator[Json]:
        """Yield what a stream begins with."""
        if self.chat:
            yield self._chunk(number, {"role": "assistant", "content": ""})

    def chunks(self, number: int, delta: TextDelta) -> Iterator[Json]:
        """Yield the objects of a streamed delta: text and thoughts, each call by itself, then the end.

        Clients read the first call of an object only, as OpenAI's server never sends more.
        """
        new: list[Json | str] = [delta.text] if delta.text else []
        if self.chat:
            texts = {"content": delta.text, "reasoning_content": delta.reasoning}
            said: Json = {name: text for name, text in texts.items() if text}
            calls = [{"tool_calls": [_call_delta(call)]} for call in delta.tool_calls]
            new = [part for part in (said, *calls) if part]
        if delta.logprobs and not new:  # text may be held back, or split over tokens
            new = [{} if self.chat else ""]
        logprobs = self._logprobs(delta.logprobs)
        for part in new:
            chunk = self._chunk(number, part)
            chunk["choices"][0]["logprobs"], logprobs = logprobs, None
            yield chunk
        if delta.finish_reason is not None and delta.stats is not None:
            end = self._chunk(number, {} if self.chat else "", delta.finish_reason)
            end["choices"][0][OWN] = delta.stats.as_dict()
            yield end

    def last(self, stats: Sequence[DecodingStats], prompts: int) -> Json:
        """Return the object that ends a stream whose client asks for usage."""
        return self._stream([]) | {"usage": usage(stats, prompts)}

    def _chunk(self, number: int, new: Json | str, reason: str | None = None) -> Json:
        content = {"delta": new} if self.chat else {"text": new}
        return self._stream(
            [{"index": number, **content, "logprobs": None, "finish_reason": reason}]
        )

    def _stream(self, choices: list[Json]) -> Json:
        return self._object("chat.completion.chunk" if self.chat else "text_completion", choices)

    def _object(self, kind: str, choices: list[Json]) -> Json:
        name = f"chatcmpl-{self.id}" if self.chat else f"cmpl-{self.id}"
        head = {"id": name, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": choices}

    def _choice(self, number: int, answer: Generation) -> Json:
        content: Json = {"text": answer.text}
        if self.chat:
            content = {"message": _message(answer)}
        logprobs = self._logprobs(answer.logprobs)
        end = {"logprobs": logprobs, "finish_reason": answer.finish_reason}
        return {"index": number, **content, **end, OWN: answer.stats.as_dict()}

    def _logprobs(self, logprobs: Sequence[TokenLogprob | WrittenLogprob]) -> Json | None:
        if not logprobs:
            return None
        entries = self.entries(logprobs)
        if self.chat:
            return {"content": entries, "refusal": None}
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [  # of tokens with one text, parts of characters, the most likely is shown
                {top["token"]: top["logprob"] for top in reversed(entry["top_logprobs"])}
                for entry in entries
            ],
        }


def _message(answer: Generation) -> Json:
    calls = [_call(call) for call in answer.tool_calls]
    message: Json = {"role": "assistant", "content": answer.text or (None if calls else "")}
    message |= {"reasoning_content": answer.reasoning} if answer.reasoning else {}
    return message | {"refusal": None} | ({"tool_calls": calls} if calls else {})


def _call(call: ToolCall) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _call_delta(call: Any) -> Json:
    function: Json = {"arguments": call.arguments}
    function |= {"name": call.name} if call.name is not None else {}
    begun = {"id": call.id, "type": "function"} if call.id is not None else {}
    return {"index": call.index, **begun, "function": function}


def usage(stats: Sequence[DecodingStats], prompts: int) -> Json:
    """Return the tokens of a request's answers; each of its ``prompts`` is counted once."""
    each = max(len(stats) // max(prompts, 1), 1)  # answers to one prompt
    asked = sum(s.prompt_tokens for s in stats[::each])
    made = sum(s.generated_tokens for s in stats)
    return {
        "prompt_tokens": asked,
        "completion_tokens": made,
        "total_tokens": asked + made,
        "prompt_tokens_details": {"cached_tokens": sum(s.cached_prompt_tokens for s in stats[::each])},
        "completion_tokens_details": {"reasoning_tokens": sum(s.reasoning_tokens for s in stats)},
    }  # fmt: skip


def encoded(data: Mapping[str, Any]) -> bytes:
    """Return JSON in UTF-8; a half of a surrogate pair, which has no bytes there, is escaped as JSON does."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode(errors="backslashreplace")


def event(data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + encoded(data) + b"\n\n"


# --- errors ---

_INVALID = "invalid_request_error"
_KINDS: tuple[tuple[type[RASDError], int, str], ...] = (
    (ContextOverflowError, 400, "context_length_exceeded"),
    (PromptError, 400, "invalid_prompt"),
    (ConfigurationError, 400, "invalid_option"),
    (DeviceMemoryError, 503, "out_of_memory"),
    # Requests are taken once the model is loaded; what may be missing then is its template.
    (ModelLoadError, 400, "chat_template"),
)
_CODES = {
    401: "invalid_api_key", 404: "model_not_found", 408: "body_timeout", 411: "invalid_body", 413: "body_too_large",
    415: "not_json", 429: "busy", 501: "not_supported", 503: "not_ready", 504: "timeout",
}  # fmt: skip


def failure(err: Exception) -> tuple[int, Json]:
    """Return the HTTP status of an error and OpenAI's object of it; of foreign errors nothing is told."""
    status, code, text, more = 500, "decoding_failed", str(err), {}
    if isinstance(err, ServerError):
        status = err.status or 500
        code = _CODES.get(status, code)
    elif isinstance(err, RASDError):
        status, code = next(((s, c) for kind, s, c in _KINDS if isinstance(err, kind)), (status, code))  # fmt: skip
        if isinstance(err, ContextOverflowError):
            names = ("prompt_tokens", "max_tokens", "window")
            more = {OWN: {name: getattr(err, name) for name in names}}
    else:
        code, text = "internal_error", "The server failed; its log says more."
    kind = _INVALID if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    return status, {"error": {"message": text, "type": kind, "param": None, "code": code, **more}}
