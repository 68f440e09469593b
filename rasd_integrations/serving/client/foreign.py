"""What a server that is not ours is sent: OpenAI's fields, and a few more where it is vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rasd_integrations.config import SAMPLING_DEFAULTS
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.wire import OWN

# Neutral values of what only vLLM reads; elsewhere they are left out.
_VLLM_ONLY: Mapping[str, Any] = {
    "top_k": 0, "min_p": 0, "repetition_penalty": 1, "ignore_eos": False, "chat_template_kwargs": {},
}  # fmt: skip
# Of our own fields: what changes the time and the quotes, not the answer, and values that every server follows.
_LEFT_OUT = {"drafting", "question", "search_query", "filter", "chunks", "rendered", "store"}
_FOLLOWED: Mapping[str, Any] = {
    "knowledge_transfer": "none", "context": "prompt", "no_repeat_ngram_size": 0, "strict": False,
}  # fmt: skip


def foreign_body(body: Mapping[str, Any], *, is_vllm: bool, address: str) -> dict[str, Any]:
    """Return the body of :mod:`~rasd_integrations.serving.wire` as another server reads it.

    ``max_tokens`` is always sent, since servers differ in what they do without it.

    Raises:
        ConfigurationError: An option would change the answer and cannot be sent.
    """
    own = body.get(OWN, {})
    out: dict[str, Any] = {"max_tokens": SAMPLING_DEFAULTS["max_tokens"], **body}
    out.pop(OWN, None)
    tools_are_strict = bool(own.get("strict"))
    for name, value in own.items():
        if name in _LEFT_OUT or value == _FOLLOWED.get(name) or (name == "strict" and value):
            continue
        raise _refused(name, value, "a server of another kind does not know it", address)
    for name, neutral in () if is_vllm else _VLLM_ONLY.items():
        value = out.pop(name, neutral)
        if value != neutral:
            raise _refused(name, value, "only vLLM's servers and `rasd serve` know it", address)
    if "messages" in out and not is_vllm:
        out["messages"] = [_without_thoughts(message) for message in out["messages"]]
    if tools_are_strict:
        out["tools"] = [
            {**tool, "function": {**tool["function"], "strict": True}} for tool in out["tools"]
        ]
    return out


def _without_thoughts(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name != "reasoning_content"}


def _refused(name: str, value: Any, why: str, address: str) -> ConfigurationError:
    msg = f"{name} is {value!r}, but {address} cannot follow it: {why}. Leave it out, or ask `rasd serve`."
    return ConfigurationError(msg)
