"""The openai package's errors as ours: by the code that the server gave, else by HTTP's status."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rasd_integrations.errors import (
    ConfigurationError,
    DecodingError,
    DeviceMemoryError,
    ModelLoadError,
    PromptError,
    PromptTooLongError,
    RASDError,
    ServerError,
    ServerTimeoutError,
)

_BY_CODE: Mapping[str, type[RASDError]] = {
    "invalid_prompt": PromptError,
    "invalid_option": ConfigurationError,
    "model_not_found": ModelLoadError,
    "chat_template": ModelLoadError,
    "out_of_memory": DeviceMemoryError,
    "decoding_failed": DecodingError,
}
_WINDOW = re.compile(r"maximum context length (?:is|of) (\d+)")
_PROMPT = re.compile(r"(\d+) (?:input tokens|in the (?:messages|prompt))|resulted in (\d+) tokens")


def our_error(err: Exception, address: str, asked: Mapping[str, Any]) -> RASDError:
    """Return the error of ours for one of the openai package, or of a broken answer."""
    body = getattr(err, "body", None)
    told: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
    if not told and not hasattr(err, "status_code"):
        return _unanswered(err, address)
    message, code = str(told.get("message") or err), told.get("code")
    status = getattr(err, "status_code", code if isinstance(code, int) else None)
    if (kind := _BY_CODE.get(str(code))) is not None:
        return kind(message)
    if code == "context_length_exceeded" or _WINDOW.search(message):
        return _too_long(message, told.get("rasd"), asked.get("max_tokens") or 0)
    if status == 404 and "model" in message:
        return ModelLoadError(f"{address}: {message}")
    if status is not None and 400 <= status < 500 and status not in (401, 403, 408, 429):
        return ConfigurationError(f"{address} refused the request ({status}): {message}")
    return _failed(status, message, address, getattr(err, "response", None))


def _failed(status: int | None, message: str, address: str, response: Any) -> ServerError:
    if status in (401, 403):
        text = f"{address} refuses the key: {message} Give api_key=, or set OPENAI_API_KEY."
    elif status == 429:
        after = getattr(response, "headers", {}).get("retry-after")
        when = f"in {after} s" if after else "later"
        text = f"{address} is busy: {message} Ask again {when}, or raise max_retries."
    else:
        text = f"{address} failed ({status or 'in the answer'}): {message}"
    return ServerError(text, status)


def _too_long(message: str, own: Any, max_tokens: int) -> RASDError:
    if isinstance(own, Mapping):
        with suppress(KeyError, TypeError, ValueError):
            return PromptTooLongError(
                int(own["prompt_tokens"]), int(own["max_tokens"]), int(own["window"])
            )
    window, prompt = _WINDOW.search(message), _PROMPT.search(message)
    if window is None:
        return PromptError(message)
    found = next((int(n) for n in prompt.groups() if n), 0) if prompt else 0
    return PromptTooLongError(found, max_tokens, int(window[1]))


def _unanswered(err: Exception, address: str) -> RASDError:
    # By name: the openai package's, and of the two HTTP libraries that its versions use.
    names = {kind.__name__ for kind in type(err).__mro__}
    cause = f"{err}" + (f" ({err.__cause__})" if err.__cause__ else "")
    if names & {"APITimeoutError", "TimeoutException"}:
        return ServerTimeoutError(
            f"{address} sent nothing for the time allowed: {cause}. Raise timeout=, or ask for less."
        )
    if names & {"APIConnectionError", "TransportError"}:
        return ServerError(
            f"{address} cannot be reached, or hung up: {cause}. Check base_url, and that the server runs."
        )
    return ServerError(
        f"{address} sent what is no answer of OpenAI's API ({type(err).__name__}: {cause}). Check base_url; "
        f"it usually ends in /v1."
    )
