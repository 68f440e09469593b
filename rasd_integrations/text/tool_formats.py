"""How each model family writes tool calls, detected from its chat template.

The ``response_template`` of transformers 5 is not used: few checkpoints have one, it yields decoded
arguments only when a call is closed (both frameworks stream the model's own JSON text), and it does not
say how a call begins, which the grammar needs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

NAME = "{name}"
"""Placeholder of the function's name in :attr:`ToolFormat.head`."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The markup of tool calls.

    Attributes:
        name: The family.
        opening: Once before the first call.
        begin: Before each call.
        head: Before the arguments; ``{name}`` is the function's name, escaped as in JSON.
        tail: After the arguments.
        separator: Between calls.
        closing: Once after the last call.
        control: Markup that may be control tokens, which the detokenizer must keep;
            :func:`tool_format` leaves those of the vocabulary.
        in_template: The chat template writes the tools; if not, the standard prompt does.
        in_history: The chat template writes past calls; if not, they become text.
    """

    name: str
    opening: str = ""
    begin: str = ""
    head: str = '{"name": "{name}", "arguments": '
    tail: str = "}"
    separator: str = ""
    closing: str = ""
    control: tuple[str, ...] = ()
    in_template: bool = True
    in_history: bool = True

    @property
    def mark(self) -> str:
        """The markup before a call, without what models vary; empty if calls are bare JSON."""
        return (self.opening or self.begin).rstrip(" \n[")

    @property
    def end_mark(self) -> str:
        """The markup after a call; empty if its JSON ends it."""
        return self.tail.lstrip("}").strip()

    @property
    def arguments_mark(self) -> str:
        """The markup between a bare name and its arguments; empty if the name is inside the JSON."""
        return self.head.partition(NAME)[2] if self.head.startswith(NAME) else ""

    def before_arguments(self, name: str) -> str:
        """Return the text of a call to ``name`` up to its arguments."""
        return self.begin + self.head.replace(NAME, _json(name)[1:-1])

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Return the ``calls`` of a message as the model writes them."""
        texts = [self._written(call.get("function", call)) for call in calls]
        return f"{self.opening}{self.separator.join(texts)}{self.closing}" if texts else ""

    def _written(self, function: Mapping[str, Any]) -> str:
        arguments = function.get("arguments", {})
        # Malformed arguments are replayed verbatim.
        text = arguments if isinstance(arguments, str) else _json(arguments)
        return f"{self.before_arguments(str(function.get('name', '')))}{text}{self.tail}"


# fmt: off
HERMES = ToolFormat(  # Qwen 2.5 and 3, Hermes 2 and 3, Granite 4, SmolLM3
    "hermes", begin="<tool_call>\n", tail="}\n</tool_call>", separator="\n",
    control=("<tool_call>", "</tool_call>"))
LLAMA3 = ToolFormat(
    "llama3", head='{"name": "{name}", "parameters": ', separator="; ", control=("<|python_tag|>",))
MISTRAL = ToolFormat(
    "mistral", opening="[TOOL_CALLS][", separator=", ", closing="]", control=("[TOOL_CALLS]",))
MISTRAL_ARGS = ToolFormat(
    "mistral_args", begin="[TOOL_CALLS]", head="{name}[ARGS]", tail="",
    control=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"))
GRANITE = ToolFormat(
    "granite", opening="<|tool_call|>[", separator=", ", closing="]", control=("<|tool_call|>",))
PHI = ToolFormat(
    "phi", begin="<|tool_call|>", tail="}<|/tool_call|>",
    control=("<|tool_call|>", "<|/tool_call|>"))
# fmt: on
FALLBACK = replace(HERMES, name="fallback", in_template=False, in_history=False)
"""For templates without tools, or with a call format that is not supported."""

# The first row whose markers are all in the chat template decides.
_FAMILIES: tuple[tuple[tuple[str, ...], ToolFormat], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), MISTRAL_ARGS),
    (("[TOOL_CALLS] [",), replace(MISTRAL, opening="[TOOL_CALLS] [")),
    (("[TOOL_CALLS]",), MISTRAL),
    (("<function=",), FALLBACK),  # calls as XML elements, some within <tool_call>
    (("<arg_key>",), FALLBACK),
    (("<tool_call>",), HERMES),
    (("<|tool_call|>", "<|/tool_call|>"), PHI),
    (("<|tool_call|>",), GRANITE),
    (('"parameters": ',), LLAMA3),
)

_PROBE_CALL, _PROBE_ID = "probe_call", "abcdefgh1"
_PARAMETERS = {
    "type": "object",
    "properties": {"text": {"type": "string", "description": "Any."}},
    "required": ["text"],
}
_PROBE_TOOL = {
    "type": "function",
    "function": {"name": "probe_tool", "description": "A probe.", "parameters": _PARAMETERS},
}
_CALLED = {"name": _PROBE_CALL, "arguments": {"text": "b"}}
_PROBE_CALLS = [{"id": _PROBE_ID, "type": "function", "function": _CALLED}]
_PROBE_TURNS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "", "tool_calls": _PROBE_CALLS},
    {"role": "tool", "tool_call_id": _PROBE_ID, "name": _PROBE_CALL, "content": "c"},
)

_PROMPT = """\
# Tools

You may call one or more functions to help with the user's request. Their signatures are given within \
<tools></tools> tags:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and its arguments within <tool_call></tool_call> \
tags, one pair of tags for each call:
<tool_call>
{"name": <function name>, "arguments": <object of arguments>}
</tool_call>
The results are given to you within <tool_response></tool_response> tags. Where no function is needed, \
answer in plain text."""


def tool_format(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> ToolFormat:
    """Return the format of the model's tool calls.

    Its chat template's text decides the family. Probes are rendered to find out if it writes tools and
    past calls, because templates mention both in branches that are never reached.
    ``chat_template_kwargs`` are the template's variables.
    """
    options = dict(chat_template_kwargs or {})

    def probe(turns: Sequence[dict[str, Any]], tools: Any) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, **options)
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return ""  # a template that refuses the probe does not show it

    template, tools = template_text(tokenizer, options), [_PROBE_TOOL]
    matches = (form for marks, form in _FAMILIES if all(mark in template for mark in marks))
    found = next(matches, FALLBACK)
    if found is not FALLBACK and "probe_tool" not in probe(_PROBE_TURNS[:1], tools):
        found = FALLBACK
    # A tokenizer may have one template with tools and another without; both must write past calls.
    if found.in_history:
        shown = all(_PROBE_CALL in probe(_PROBE_TURNS, given) for given in (tools, None))
        found = replace(found, in_history=shown)
    return replace(found, control=special_among(tokenizer, found.control))


def with_tool_prompt(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    format: ToolFormat,
) -> list[dict[str, Any]]:
    """Return plain messages as templates of this format accept them.

    For a template without tools, the system prompt lists ``tools``, past calls become text of the
    assistant and results user turns. Otherwise only what its family refuses is changed: long call ids
    (Mistral) and several calls in one message (Llama).
    """
    turns = [dict(message) for message in messages]
    if format.name in (MISTRAL.name, MISTRAL_ARGS.name):
        turns = _with_short_ids(turns)
    if format.name == LLAMA3.name:
        turns = list(_one_call_each(turns))
    if not format.in_history:
        turns = [_with_calls_as_text(turn, format) for turn in turns]
    if not format.in_template:
        turns = results_as_text(turns)
        if tools:
            listed = "\n".join(_json(_complete(tool)) for tool in tools)
            turns = _with_system(turns, _PROMPT.replace("{tools}", listed))
    return turns


def template_tools(
    tools: Sequence[Mapping[str, Any]], format: ToolFormat
) -> list[dict[str, Any]] | None:
    """Return ``tools`` for the template, ``None`` if it gets none."""
    return [_complete(tool) for tool in tools] if tools and format.in_template else None


def results_as_text(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``turns`` with consecutive tool results as one user turn, in Hermes' markup."""
    done: list[dict[str, Any]] = []
    for is_result, group in itertools.groupby(turns, lambda turn: turn["role"] == "tool"):
        if is_result:
            texts = (f"<tool_response>\n{turn['content']}\n</tool_response>" for turn in group)
            done.append({"role": "user", "content": "\n".join(texts)})
        else:
            done += group
    return done


def template_text(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """Return the source of the template that renders tools; empty if there is none."""
    named = options.get("chat_template")
    if not (named or tokenizer.chat_template):
        return ""
    try:
        return str(tokenizer.get_chat_template(named, tools=[_PROBE_TOOL]))
    except ValueError:  # several templates with names, none of them the default
        return ""


def special_among(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[str, ...]:
    """Return the ``texts`` that are control tokens of the vocabulary."""
    special = special_texts(tokenizer)
    return tuple(text for text in texts if text in special)


def special_texts(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the texts of the vocabulary's control tokens."""
    special = {str(token) for token in added_tokens(tokenizer).values() if token.special}
    return frozenset(filter(None, special | set(tokenizer.all_special_tokens)))


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, AddedToken]:
    """Return the tokens added to the vocabulary, by id; old tokenizers list none."""
    found: Mapping[int, AddedToken] = getattr(tokenizer, "added_tokens_decoder", {})
    return found


def _with_short_ids(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace call ids by nine letters and digits; results without an id get their call's."""
    waiting: list[str] = []
    for turn in turns:
        if calls := turn.get("tool_calls"):
            waiting = [str(call.get("id") or place) for place, call in enumerate(calls)]
            turn["tool_calls"] = [
                {**call, "id": _short_id(own)} for call, own in zip(calls, waiting, strict=True)
            ]
        elif turn["role"] == "tool":
            own = str(turn.get("tool_call_id") or next(iter(waiting), ""))
            waiting = [other for other in waiting if other != own]
            turn["tool_call_id"] = _short_id(own)
    return turns


def _short_id(id: str) -> str:
    if len(id) == 9 and id.isascii() and id.isalnum():
        return id
    return hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:9]


def _one_call_each(turns: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield ``turns`` with one call a message, each followed by its result."""
    results: list[dict[str, Any]] = []
    rest = list(reversed(turns))
    while rest:
        turn = rest.pop()
        calls = turn.get("tool_calls") or ()
        if len(calls) < 2:
            yield turn
            continue
        while rest and rest[-1]["role"] == "tool":
            results.append(rest.pop())
        ids = [call.get("id") for call in calls]
        for call in calls:
            yield {**turn, "tool_calls": [call]}
            named = (r for r in results if r.get("tool_call_id") == call.get("id"))
            unknown = (r for r in results if r.get("tool_call_id") not in ids)  # taken in order
            own = next(itertools.chain(named, unknown), None)
            if own is not None:
                results.remove(own)
                yield own
        yield from results
        results.clear()


def _with_calls_as_text(turn: dict[str, Any], format: ToolFormat) -> dict[str, Any]:
    calls = turn.pop("tool_calls", None)
    if calls:
        turn["content"] = "\n".join(t for t in (turn["content"], format.written(calls)) if t)
    return turn


def _with_system(turns: list[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    if turns and turns[0]["role"] in ("system", "developer"):
        head = "\n\n".join(text for text in (turns[0]["content"], prompt) if text)
        return [{**turns[0], "content": head}, *turns[1:]]
    return [{"role": "system", "content": prompt}, *turns]


def _complete(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool with exactly the fields that templates read unconditionally."""
    function = {k: v for k, v in tool.get("function", tool).items() if k != "strict"}
    blank = {"description": "", "parameters": {"type": "object", "properties": {}}}
    missing = {k: v for k, v in blank.items() if function.get(k) is None}
    return {"type": "function", "function": {**function, **missing}}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
