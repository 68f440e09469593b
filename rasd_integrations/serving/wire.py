"""Requests as they go over the wire: OpenAI's chat body, with our own fields under ``rasd``.

The client writes what the server reads, so both are here. Sampling options of other servers (``top_k``, ``min_p``,
``repetition_penalty``, ``chat_template_kwargs``) have vLLM's names and places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from rasd_integrations.config import ContextMode, SamplingParams, reject_unknown
from rasd_integrations.errors import ConfigurationError, PromptError
from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.runtime.hints import explicit_hints
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.text.prompt.blocks import blocks_text
from rasd_integrations.transfer import rule_name, transfer_rule
from rasd_integrations.types import Chunk, Message

OWN = "rasd"
MOST_ANSWERS = 16  # of one request

_OPENAI = ("temperature", "top_p", "seed")  # under OpenAI's names
_OTHERS = ("top_k", "min_p", "repetition_penalty")  # under vLLM's
_OURS = (
    "no_repeat_ngram_size", "ignore_eos", "scored", "use_generation_config", "on_cut", "drafting",
    "knowledge_transfer",
)  # fmt: skip
_HINTS = ("question", "search_query", "filter")
OWN_FIELDS = (*_OURS, *_HINTS, "chunks", "rendered", "context", "store", "grammar", "strict")
"""What a request may have under ``rasd``."""

_READ = frozenset(
    {*_OPENAI, *_OTHERS, OWN, "model", "max_tokens", "max_completion_tokens", "stop", "n", "stream", "stream_options",
     "chat_template_kwargs"}
)  # fmt: skip
_CHAT = _READ | {"messages", "tools", "tool_choice", "parallel_tool_calls", "response_format"}
_COMPLETION = _READ | {"prompt"}
_LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"})
# OpenAI's fields that are refused unless they ask for what is done anyway.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "store": (False,), "echo": (False,),
    "best_of": (1,), "modalities": (["text"],), "logprobs": (False,), "suffix": ("",), "functions": ([],),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One HTTP request for answers.

    Attributes:
        model: The name that was asked for.
        requests: What is to be answered, one for each prompt of a completion.
        count: Answers for each.
        stream: As they are made.
        include_usage: A stream ends with the number of tokens.
        template_kwargs: For the chat template.
    """

    model: str
    requests: tuple[Request, ...]
    count: int = 1
    stream: bool = False
    include_usage: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        """Number of answers that will be made."""
        return len(self.requests) * self.count

    def each(self) -> list[Request]:
        """Return a request for each answer; with a seed, each answer after the first has one of its own."""
        return [_seeded(request, n) for request in self.requests for n in range(self.count)]


def _seeded(request: Request, number: int) -> Request:
    seed = request.params.seed
    if seed is None or number == 0:
        return request
    return replace(request, params=replace(request.params, seed=seed + number))


# --- reading: the server ---


def read_chat(body: Mapping[str, Any]) -> Asked:
    """Return what a body of ``/v1/chat/completions`` asks for.

    Raises:
        ConfigurationError: A field that is unknown, out of range, or not supported.
        PromptError: Messages that cannot be a prompt.
    """
    _check_fields(body, _CHAT)
    own = _own(body)
    response_format, grammar = body.get("response_format"), own.get("grammar")
    if grammar is not None:
        _check(
            "rasd.grammar", grammar, isinstance(grammar, Mapping), "a mapping of kind and source"
        )
        grammar = Grammar(**dict(grammar))
    if grammar is not None and response_format is not None:
        msg = "response_format and rasd.grammar both say what the answer must match; give one of them."
        raise ConfigurationError(msg)
    tools = ToolUse.of(
        _listed(body, "tools"), body.get("tool_choice"),
        parallel=_flag(body, "parallel_tool_calls"), strict=_flag(own, "strict"),
    )  # fmt: skip
    params = _params(body, own, grammar or Grammar.of_response_format(response_format))
    prompt = read_messages(body.get("messages"))
    return _asked(body, [_request(prompt, params, own, tools)])


def read_completion(body: Mapping[str, Any]) -> Asked:
    """Return what a body of ``/v1/completions`` asks for.

    Raises:
        ConfigurationError: A field that is unknown, out of range, or not supported.
        PromptError: A prompt that is no text.
    """
    _check_fields(body, _COMPLETION)
    own, prompt = _own(body), body.get("prompt")
    prompts: list[Any] = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(isinstance(p, str) for p in prompts):
        msg = f"prompt is {_shown(prompt)}, but must be a text or a list of texts; token ids are not read."
        raise PromptError(msg)
    params = _params(body, own, None)
    return _asked(body, [_request(p, params, own, None) for p in prompts])


def read_messages(given: Any) -> list[Message]:
    """Return OpenAI's messages as chat templates read them.

    Raises:
        PromptError: They are no list of messages, or a part of one is no text.
    """
    if not isinstance(given, list) or not given:
        msg = f"messages is {_shown(given)}, but must be a list of one message or more."
        raise PromptError(msg)
    return [_message(message, place) for place, message in enumerate(given)]


_ROLES = {"developer": "system", "function": "tool"}


def _message(given: Any, place: int) -> Message:
    role = given.get("role") if isinstance(given, Mapping) else None
    if not isinstance(role, str):
        msg = f"messages[{place}] is {_shown(given)}, but must have a role and a content."
        raise PromptError(msg)
    role, content = _ROLES.get(role, role), given.get("content")
    if not isinstance(content, str | list | None):
        msg = f"messages[{place}].content is {_shown(content)}, but must be a text or a list of parts."
        raise PromptError(msg)
    out: dict[str, Any] = {"role": role, "content": blocks_text(content or "", role)}
    calls = given.get("tool_calls")
    if calls:
        if not isinstance(calls, list):
            msg = f"messages[{place}].tool_calls is {_shown(calls)}, but must be a list."
            raise PromptError(msg)
        out["tool_calls"] = [_call(call, place) for call in calls]
    thought = given.get("reasoning_content") or given.get("reasoning")
    if isinstance(thought, str) and thought:
        out["reasoning_content"] = thought
    return out | {n: given[n] for n in ("tool_call_id", "name") if isinstance(given.get(n), str)}


def _call(given: Any, place: int) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        msg = f"messages[{place}] has the call {_shown(given)}, but a call has a function with a name."
        raise PromptError(msg)
    arguments = (function or {}).get("arguments") or {}
    if isinstance(arguments, str):
        try:  # templates write an object themselves; what is none is shown as the model wrote it
            parsed = json.loads(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
        except ValueError:
            pass
    return {"id": given.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}}  # fmt: skip


def _check_fields(body: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in body.items():
        if name in known or name in _LABELS or value is None:
            continue
        if name not in _NEUTRAL:
            reject_unknown([name], known, "a request")
        if value not in _NEUTRAL[name]:
            msg = f"{name} is {_shown(value)}, but this server does not support it. Leave it out."
            raise ConfigurationError(msg)


def _own(body: Mapping[str, Any]) -> Mapping[str, Any]:
    own = body.get(OWN) or {}
    _check(OWN, own, isinstance(own, Mapping), f"a mapping of {', '.join(OWN_FIELDS)}")
    reject_unknown(own, OWN_FIELDS, "rasd of a request")
    return own


def _params(
    body: Mapping[str, Any], own: Mapping[str, Any], grammar: Grammar | None
) -> SamplingParams:
    options = {name: body[name] for name in (*_OPENAI, *_OTHERS) if body.get(name) is not None}
    options |= {name: own[name] for name in _OURS if own.get(name) is not None}
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            options.setdefault("max_tokens", body[name])
    if (stop := body.get("stop")) is not None:
        _check("stop", stop, isinstance(stop, str | list), "a text or a list of texts")
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    for name in ("ignore_eos", "scored", "use_generation_config", "drafting"):
        _check(
            f"rasd.{name}", own.get(name), isinstance(own.get(name, False), bool), "true or false"
        )
    return SamplingParams(**options, grammar=grammar)


def _request(
    prompt: Prompt, params: SamplingParams, own: Mapping[str, Any], tools: ToolUse | None
) -> Request:
    given = {name: own[name] for name in (*_HINTS, "chunks") if own.get(name) is not None}
    given |= {"context": own["rendered"]} if own.get("rendered") is not None else {}
    hints = PromptHints(**explicit_hints(given, _chunk)) if given else None
    context, searches = own.get("context"), own.get("store")
    modes = get_args(ContextMode)
    _check("rasd.context", context, context in (None, *modes), "'prompt' or 'documents'")
    _check("rasd.store", searches, searches is None or searches is False, "false, or left out")
    return Request(prompt, params, hints, tools, context=context, searches=searches is not False)


def _chunk(given: Any, rank: int) -> Chunk | None:
    if not isinstance(given, Mapping):
        return None
    reject_unknown(given, ("text", "id", "metadata", "stored"), f"rasd.chunks[{rank}]")
    kinds: Mapping[str, Any] = {
        "text": str,
        "id": str | None,
        "metadata": Mapping,
        "stored": str | None,
    }
    for name, value in {"text": None, **given}.items():
        ok = isinstance(value, kinds[name])
        _check(f"rasd.chunks[{rank}].{name}", value, ok, "metadata is a mapping, all else text")
    return Chunk(**given, rank=rank)


def _asked(body: Mapping[str, Any], requests: Sequence[Request]) -> Asked:
    count, options = body.get("n"), body.get("stream_options") or {}
    ok = count is None or (type(count) is int and 1 <= count * len(requests) <= MOST_ANSWERS)
    _check("n", count, ok, f"at least 1, and {MOST_ANSWERS} answers at most in all")
    _check("stream_options", options, isinstance(options, Mapping), "a mapping")
    reject_unknown(options, ("include_usage", "include_obfuscation"), "stream_options")
    kwargs = body.get("chat_template_kwargs") or {}
    _check("chat_template_kwargs", kwargs, isinstance(kwargs, Mapping), "a mapping")
    model = body.get("model", "")
    _check("model", model, isinstance(model, str), "a text")
    return Asked(
        model=model, requests=tuple(requests), count=count or 1, stream=bool(_flag(body, "stream")),
        include_usage=bool(_flag(options, "include_usage")), template_kwargs=kwargs,
    )  # fmt: skip


def _flag(body: Mapping[str, Any], name: str) -> bool | None:
    value = body.get(name)
    _check(name, value, isinstance(value, bool | None), "true or false")
    return value


def _listed(body: Mapping[str, Any], name: str) -> list[Any] | None:
    value = body.get(name)
    _check(name, value, isinstance(value, list | None), "a list")
    return value


def _check(name: str, value: object, ok: bool, limit: str) -> None:
    if not ok:
        msg = f"{name} is {_shown(value)}, but must be {limit}."
        raise ConfigurationError(msg)


def _shown(value: object) -> str:
    """Return a value as an error message shows it: short, since it may be a whole document."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


# --- writing: the client ---


def write_chat(request: Request, template_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body for messages; :func:`read_chat` makes the same request of it."""
    body = _written(request, template_kwargs)
    assert not isinstance(request.prompt, str)  # noqa: S101  (the caller's choice of the path)
    body["messages"] = write_messages(request.prompt)
    grammar, own = request.params.grammar, body.setdefault(OWN, {})
    if grammar is not None and grammar.kind == "json_schema":
        schema = {"name": "answer", "schema": json.loads(grammar.source)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif grammar is not None:
        own["grammar"] = {"kind": grammar.kind, "source": grammar.source}
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
    """Return the body for a plain text; :func:`read_completion` makes the same request of it."""
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
    body: dict[str, Any] = {n: set_[n] for n in (*_OPENAI, *_OTHERS, "max_tokens") if n in set_}
    if params.stop:
        body["stop"] = list(params.stop)
    if template_kwargs:
        body["chat_template_kwargs"] = dict(template_kwargs)
    own: dict[str, Any] = {name: set_[name] for name in _OURS if name in set_}
    if "knowledge_transfer" in own:
        own["knowledge_transfer"] = _named_rule(params.knowledge_transfer)
    hints = request.hints or PromptHints()
    own |= {n: getattr(hints, n) for n in _HINTS if getattr(hints, n) is not None}
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
    metadata = _plain(chunk.metadata)
    given = {"id": chunk.id, "stored": chunk.stored, "metadata": metadata or None}
    return {"text": chunk.text, **{n: v for n, v in given.items() if v is not None}}


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that JSON can hold."""
    out = {}
    for name, value in metadata.items():
        try:
            out[str(name)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            continue
    return out
