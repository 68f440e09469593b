"""How a model writes tool calls: read off its chat template, or given to it by a prompt of our own.

Tokenizers of transformers 5 may carry a ``response_template`` that parses answers. It is not used here:
checkpoints hardly ship it, it hands out the arguments decoded and only when a call is closed, while
both frameworks want the model's own JSON text as it is written; and it says nothing about how a call
that must be made begins, which the grammar needs to know.
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
    from transformers import PreTrainedTokenizerBase

NAME = "{name}"
"""Stands for the function's name in :attr:`ToolFormat.head`."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """The markup of tool calls: opening, then begin, head, arguments and tail of each, then closing.

    Attributes:
        name: The family: ``hermes``, ``llama3``, ``mistral``, ``mistral_args``, ``granite``, ``phi`` or
            ``fallback``.
        opening: Once before the first call.
        begin: Before each call.
        head: Before the arguments; ``{name}`` stands for the function's name, escaped as in JSON.
        tail: After the arguments.
        separator: Between calls.
        closing: Once after the last call.
        control: Control tokens that an answer must keep to be parsed.
        in_template: Whether the chat template shows the tools it is given; else the standard prompt does.
        in_history: Whether the chat template writes past calls; else they are written into the text.
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
    def trigger(self) -> str:
        """The text that tells that calls begin."""
        return self.opening or self.begin or self.head.partition(NAME)[0]

    @property
    def mark(self) -> str:
        """The markup before a call, without what models vary; empty where calls are bare JSON."""
        return (self.opening or self.begin).rstrip(" \n[")

    @property
    def end_mark(self) -> str:
        """The markup after a call; empty where its JSON ends it."""
        return self.tail.lstrip("}").strip()

    @property
    def arguments_mark(self) -> str:
        """What stands between a bare name and its arguments; empty where the name is inside the JSON."""
        return self.head.partition(NAME)[2] if self.head.startswith(NAME) else ""

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Return ``calls``, in the form of messages, as the model itself would write them."""
        texts = [self._written(call) for call in calls]
        return f"{self.opening}{self.separator.join(texts)}{self.closing}" if texts else ""

    def _written(self, call: Mapping[str, Any]) -> str:
        function = call.get("function", call)
        arguments = function.get("arguments", {})
        # What a model broke is shown to it as it was.
        text = arguments if isinstance(arguments, str) else _json(arguments)
        head = self.head.replace(NAME, _json(str(function.get("name", "")))[1:-1])
        return f"{self.begin}{head}{text}{self.tail}"


HERMES = ToolFormat(
    "hermes", begin="<tool_call>\n", tail="}\n</tool_call>", separator="\n"
)  # Qwen 2.5 and 3, Hermes 2 and 3, Granite 4, SmolLM3
LLAMA3 = ToolFormat("llama3", head='{"name": "{name}", "parameters": ', separator="; ")
MISTRAL = ToolFormat("mistral", opening="[TOOL_CALLS][", separator=", ", closing="]")
MISTRAL_ARGS = ToolFormat("mistral_args", begin="[TOOL_CALLS]", head="{name}[ARGS]", tail="")
GRANITE = ToolFormat("granite", opening="<|tool_call|>[", separator=", ", closing="]")
PHI = ToolFormat("phi", begin="<|tool_call|>", tail="}<|/tool_call|>")
FALLBACK = replace(HERMES, name="fallback", in_template=False, in_history=False)
"""For models whose template tells of no tools, or in a form that is not read here."""

# What of each family's markup may be control tokens, which a detokenizer drops unless told otherwise.
_MARKS = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "fallback": ("<tool_call>", "</tool_call>"),
    "llama3": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]",),
    "mistral_args": ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    "granite": ("<|tool_call|>",),
    "phi": ("<|tool_call|>", "<|/tool_call|>"),
}
# Calls written as XML elements, in templates that share Hermes' outer mark.
_XML_CALLS = ("<function=", "<arg_key>")

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "description": "Any."}},
            "required": ["text"],
        },
    },
}
_PROBE_CALL = "probe_call"
_PROBE_ID = "abcdefgh1"
_PROBE_TURNS: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": _PROBE_ID,
                "type": "function",
                "function": {"name": _PROBE_CALL, "arguments": {"text": "b"}},
            }
        ],
    },
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
    """Return how the model behind ``tokenizer`` writes calls.

    The template's text tells the family. Whether it shows tools and past calls is tried out, because
    templates mention both in places that are never reached. ``chat_template_kwargs`` are the
    template's variables, as in :class:`~rasd_integrations.text.prompt.template.ChatTemplate`.
    """
    options = dict(chat_template_kwargs or {})
    found = _family(template_text(tokenizer, options))
    if found is None or "probe_tool" not in _probed(tokenizer, _PROBE_TURNS[:1], True, options):
        found = FALLBACK
    # A tokenizer may have one template for tools and one for no tools, after which calls still stand.
    elif any(
        _PROBE_CALL not in _probed(tokenizer, _PROBE_TURNS, t, options) for t in (True, False)
    ):
        found = replace(found, in_history=False)
    return replace(found, control=special_among(tokenizer, _MARKS[found.name]))


def with_tool_prompt(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    format: ToolFormat,
) -> list[dict[str, Any]]:
    """Return plain messages as a template of this format takes them.

    Where the template has no tools section, the system prompt tells of ``tools``, past calls become
    the assistant's text and results become user turns. Else only what such templates refuse is
    changed: call ids that Mistral's find too long, and several calls in one message of Llama's.
    """
    turns = [dict(message) for message in messages]
    if format.name in ("mistral", "mistral_args"):
        turns = _with_short_ids(turns)
    if format.name == "llama3":
        turns = list(_one_call_each(turns))
    if not format.in_history:
        turns = [_with_calls_as_text(turn, format) for turn in turns]
    if not format.in_template:
        turns = results_as_text(turns)
        if tools:
            turns = _with_system(turns, _PROMPT.replace("{tools}", _listed(tools)))
    return turns


def template_tools(
    tools: Sequence[Mapping[str, Any]], format: ToolFormat
) -> list[dict[str, Any]] | None:
    """Return ``tools`` as templates read them; ``None`` where the template is not to tell of any."""
    return [_shown(tool) for tool in tools] if tools and format.in_template else None


def results_as_text(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``turns`` with neighbouring tool results as one user turn, in Hermes' markup."""
    done: list[dict[str, Any]] = []
    inside = False
    for turn in turns:
        if turn["role"] != "tool":
            done.append(turn)
            inside = False
            continue
        text = f"<tool_response>\n{turn['content']}\n</tool_response>"
        if inside:
            done[-1]["content"] += f"\n{text}"
        else:
            done.append({"role": "user", "content": text})
            inside = True
    return done


def template_text(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> str:
    """Return the source of the template that is used when there are tools; empty where there is none."""
    named = options.get("chat_template")
    if not (named or tokenizer.chat_template):
        return ""
    try:
        return str(tokenizer.get_chat_template(named, tools=[_PROBE_TOOL]))
    except ValueError:  # several templates with names, none of them the default
        return ""


def special_among(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[str, ...]:
    """Return those of ``texts`` that are control tokens of the vocabulary."""
    special = special_texts(tokenizer)
    return tuple(text for text in texts if text in special)


def special_texts(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the control tokens of the vocabulary, as texts."""
    known = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {str(token) for token in known if token.special}
    return frozenset(filter(None, special | set(tokenizer.all_special_tokens)))


def _family(template: str) -> ToolFormat | None:
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" in template:
            return MISTRAL_ARGS
        spaced = "[TOOL_CALLS] [" in template
        return replace(MISTRAL, opening="[TOOL_CALLS] [") if spaced else MISTRAL
    if any(mark in template for mark in _XML_CALLS):
        return None
    if "<tool_call>" in template:
        return HERMES
    if "<|tool_call|>" in template:
        return PHI if "<|/tool_call|>" in template else GRANITE
    return LLAMA3 if '"parameters": ' in template else None


def _probed(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: bool,
    options: Mapping[str, Any],
) -> str:
    listed: Any = [_PROBE_TOOL] if tools else None
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=listed, tokenize=False, **options)
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return ""  # a template that refuses the probe, or trips over it, shows nothing of it


def _with_short_ids(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``turns`` with ids of nine letters and digits; results without one get their call's."""
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
    """Yield ``turns`` with every call in a message of its own, its result right behind it."""
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
            strange = (r for r in results if r.get("tool_call_id") not in ids)  # taken in order
            own = next(itertools.chain(named, strange), None)
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


def _listed(tools: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(_json(_shown(tool)) for tool in tools)


def _shown(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool with every field that templates read without asking, and no other."""
    function = {k: v for k, v in tool.get("function", tool).items() if k != "strict"}
    blank = {"description": "", "parameters": {"type": "object", "properties": {}}}
    missing = {k: v for k, v in blank.items() if function.get(k) is None}
    return {"type": "function", "function": {**function, **missing}}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
