"""Requests as they go over the wire: OpenAI's body, with our own fields under ``rasd``.

What is written here ``reading`` reads. Sampling options of other servers (``top_k``, ``min_p``,
``repetition_penalty``, ``chat_template_kwargs``) have vLLM's names and places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.prompting import PromptHints
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.stats import plain_json
from rasd_integrations.transfer import rule_name, transfer_rule
from rasd_integrations.types import Chunk, Message

OWN = "rasd"

OPENAI = ("temperature", "top_p", "seed")  # under OpenAI's names
OTHERS = ("top_k", "min_p", "repetition_penalty", "ignore_eos")  # under vLLM's
OURS = (
    "no_repeat_ngram_size", "scored", "use_generation_config", "on_cut", "drafting",
    "knowledge_transfer",
)  # fmt: skip
HINTS = ("question", "search_query", "filter")
OWN_FIELDS = (*OURS, *HINTS, "chunks", "rendered", "context", "store", "grammar", "strict")
"""What a request may have under ``rasd``."""


def write_chat(request: Request, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for messages; ``reading.read_chat`` makes the same request of it."""
    body = _written(request, template_kwargs)
    assert not isinstance(request.prompt, str)  # noqa: S101  (the caller's choice of the path)
    body["messages"] = write_messages(request.prompt)
    grammar, own = request.params.grammar, body.setdefault(OWN, {})
    if grammar is not None and grammar.kind == "json_schema":
        schema = {"name": "answer", "schema": json.loads(grammar.source)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
        del own["grammar"]  # OpenAI's chat has a field for it, which other servers know
    if (tools := request.tools) is not None:
        named = {"type": "function", "function": {"name": tools.choice}}
        body["tools"] = [dict(tool) for tool in tools.tools]
        body["tool_choice"] = (
            tools.choice if tools.choice in ("auto", "none", "required") else named
        )
        body["parallel_tool_calls"] = tools.parallel
        own["strict"] = tools.strict
    if not own:
        del body[OWN]
    return body


def write_completion(request: Request) -> dict[str, Any]:
    """Return the body for a plain text; ``reading.read_completion`` makes the same request of it."""
    return {**_written(request, {}), "prompt": request.prompt}


def write_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages for templates in OpenAI's form."""
    return [_written_message(message) for message in messages]


def _written_message(message: Message) -> dict[str, Any]:
    calls = [
        {
            **call,
            "function": {**call["function"], "arguments": _text(call["function"]["arguments"])},
        }
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else dict(message)


def _text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _written(request: Request, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    params, defaults = request.params, SamplingParams()
    given = {f.name: getattr(params, f.name) for f in fields(params)}
    set_ = {name: value for name, value in given.items() if value != getattr(defaults, name)}
    body: dict[str, Any] = {n: set_[n] for n in (*OPENAI, *OTHERS, "max_tokens") if n in set_}
    if params.stop:
        body["stop"] = list(params.stop)
    if params.top_logprobs is not None:
        chat = not isinstance(request.prompt, str)
        most = params.top_logprobs
        body |= {"logprobs": True, "top_logprobs": most} if chat else {"logprobs": most}
    if template_kwargs:
        body["chat_template_kwargs"] = dict(template_kwargs)
    own: dict[str, Any] = {name: set_[name] for name in OURS if name in set_}
    if "knowledge_transfer" in own:
        own["knowledge_transfer"] = _named_rule(params.knowledge_transfer)
    if (grammar := params.grammar) is not None:
        own["grammar"] = {"kind": grammar.kind, "source": grammar.source}
    hints = request.hints or PromptHints()
    own |= {n: getattr(hints, n) for n in HINTS if getattr(hints, n) is not None}
    own |= {"rendered": hints.context} if hints.context is not None else {}
    own |= {"chunks": [_written_chunk(chunk) for chunk in hints.chunks]} if hints.chunks else {}
    own |= {"context": request.context} if request.context is not None else {}
    own |= {} if request.searches else {"store": False}
    return {**body, OWN: own} if own else body


def _named_rule(rule: Any) -> str:
    name = rule if isinstance(rule, str) else rule_name(rule)
    try:
        transfer_rule(name)
    except ConfigurationError as err:
        msg = f"knowledge_transfer is {rule!r}, which has no name that a server knows. Name a rule."
        raise ConfigurationError(msg) from err
    return str(name)


def _written_chunk(chunk: Chunk) -> dict[str, Any]:
    metadata = plain_json(chunk.metadata)
    given = {"id": chunk.id, "stored": chunk.stored, "metadata": metadata or None}
    return {"text": chunk.text, **{n: v for n, v in given.items() if v is not None}}
