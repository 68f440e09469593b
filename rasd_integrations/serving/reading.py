"""Reads requests off the wire; what cannot be honoured is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from rasd_integrations.config import ContextMode, SamplingParams, reject_unknown
from rasd_integrations.errors import ConfigurationError, PromptError
from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.response_format import Grammar, ToolUse
from rasd_integrations.runtime.hints import explicit_hints
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.serving.wire import HINTS, OPENAI, OTHERS, OURS, OWN, OWN_FIELDS
from rasd_integrations.text.answer.logprobs import num_alternatives
from rasd_integrations.text.prompt.blocks import blocks_text
from rasd_integrations.types import Chunk, Message

MOST_ANSWERS = 16  # of one request
_MOST_LOGPROBS = 5  # of a completion's token, as OpenAI has it

_READ = frozenset(
    {*OPENAI, *OTHERS, OWN, "model", "max_tokens", "max_completion_tokens", "stop", "n", "stream", "stream_options",
     "chat_template_kwargs"}
)  # fmt: skip
_CHAT = _READ | {
    "messages",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "logprobs",
    "top_logprobs",
}
_COMPLETION = _READ | {"prompt", "logprobs"}
_LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier"})
# Fields of OpenAI, and of servers and routers like vLLM's, that are refused unless they ask for what is done anyway.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "store": (False,), "echo": (False,),
    "best_of": (1,), "modalities": (["text"],), "suffix": ("",), "functions": ([],),
    "no_stop_trim": (False,), "continue_final_message": (False,), "skip_special_tokens": (True,),
    "separate_reasoning": (True,), "stream_reasoning": (True,), "include_reasoning": (True,),
    "return_hidden_states": (False,), "add_generation_prompt": (True,),
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


def read_chat(body: Mapping[str, Any]) -> Asked:
    """Return what a body of ``/v1/chat/completions`` asks for.

    Raises:
        ConfigurationError: A field that is unknown, out of range, or not supported.
        PromptError: Messages that cannot be a prompt.
    """
    _check_fields(body, _CHAT)
    own = _own(body)
    response_format, grammar = body.get("response_format"), _grammar(own)
    if grammar is not None and response_format is not None:
        msg = "response_format and rasd.grammar both say what the answer must match; give one of them."
        raise ConfigurationError(msg)
    tools = ToolUse.of(
        _listed(body, "tools"), body.get("tool_choice"),
        parallel=_flag(body, "parallel_tool_calls"), strict=_flag(own, "strict"),
    )  # fmt: skip
    most = num_alternatives(_flag(body, "logprobs"), body.get("top_logprobs"))
    params = _params(body, own, grammar or Grammar.of_response_format(response_format), most)
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
    most = body.get("logprobs")
    ok = most is None or (type(most) is int and 0 <= most <= _MOST_LOGPROBS)
    _check("logprobs", most, ok, f"a number in [0, {_MOST_LOGPROBS}]")
    params = _params(body, own, _grammar(own), most)
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


def _grammar(own: Mapping[str, Any]) -> Grammar | None:
    given = own.get("grammar")
    if given is None:
        return None
    _check("rasd.grammar", given, isinstance(given, Mapping), "a mapping of kind and source")
    reject_unknown(given, ("kind", "source"), "rasd.grammar")
    return Grammar(given.get("kind", ""), given.get("source", ""))


def _params(
    body: Mapping[str, Any], own: Mapping[str, Any], grammar: Grammar | None, most: int | None
) -> SamplingParams:
    options = {name: body[name] for name in (*OPENAI, *OTHERS) if body.get(name) is not None}
    options |= {name: own[name] for name in OURS if own.get(name) is not None}
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            options.setdefault("max_tokens", body[name])
    if (stop := body.get("stop")) is not None:
        _check("stop", stop, isinstance(stop, str | list), "a text or a list of texts")
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    _flag(body, "ignore_eos")
    for name in ("scored", "use_generation_config", "drafting"):
        _check(
            f"rasd.{name}", own.get(name), isinstance(own.get(name, False), bool), "true or false"
        )
    return SamplingParams(**options, grammar=grammar, top_logprobs=most)


def _request(
    prompt: Prompt, params: SamplingParams, own: Mapping[str, Any], tools: ToolUse | None
) -> Request:
    given = {name: own[name] for name in (*HINTS, "chunks") if own.get(name) is not None}
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
