"""Parses a streamed answer into text, reasoning and tool calls."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rasd_integrations.text.answer.reader import BLANK, Reading, TextReader, json_text
from rasd_integrations.text.tool_formats import ToolFormat, special_among, template_text
from rasd_integrations.types import ToolCallDelta

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ARGUMENTS = ("arguments", "parameters")
# An object without markup is a call only if it has no other keys.
_CALL_KEYS = ("name", "type", "id", *_ARGUMENTS)
_VALUE_STARTS = tuple('{["-0123456789tfn')
_BETWEEN_CALLS = tuple(",;]}")  # separators, and brackets that models close once too often
_PYTHON_TAG = "<|python_tag|>"
_CALL_ID = "[CALL_ID]"
_IN_NAME = re.compile(r'[^\s\[\]{}"<]+')
_FENCE = "```"
_IN_FENCE = re.compile(r"\w+")
_WHOLE_ANSWER = re.compile(r"\s*(?:```\w*\s*)?(\{.*\})\s*(?:```\s*)?", re.DOTALL)
_REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The markup of a model's reasoning.

    Attributes:
        begin: Before it.
        end: After it.
        control: Those of the two that are control tokens, which the detokenizer must keep.
    """

    begin: str = "<think>"
    end: str = "</think>"
    control: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed piece of an answer: new text, reasoning and pieces of calls."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def joined(self, after: Parsed) -> Parsed:
        """Return this piece and the one ``after`` it as one."""
        return Parsed(
            self.text + after.text,
            self.reasoning + after.reasoning,
            self.tool_calls + after.tool_calls,
        )


def reasoning_format(
    tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None
) -> ReasoningFormat | None:
    """Return the model's reasoning markup; ``None`` if it has none."""
    template = template_text(tokenizer, chat_template_kwargs or {})
    added = tokenizer.get_added_vocab()
    for begin, end in _REASONING:
        if any(mark in template for mark in (begin, end)) or end in added:
            return ReasoningFormat(begin, end, special_among(tokenizer, (begin, end)))
    return None


def opens_thought(prompt_text_tail: str, format: ReasoningFormat | None) -> bool:
    """Return True if a prompt that ends in ``prompt_text_tail`` has opened the reasoning.

    Only a mark at the very end counts: further up it may belong to a document.
    """
    return format is not None and prompt_text_tail.rstrip().endswith(format.begin)


def parsed_arguments(text: str) -> dict[str, Any] | None:
    """Return the arguments of a call; ``None`` if they are not a JSON object.

    Empty text is no arguments. Accepts an object written as a JSON string, and unescaped line breaks
    inside strings.
    """
    if not text.strip():
        return {}
    try:
        value = json.loads(text, strict=False)
        if isinstance(value, str):
            value = json.loads(value, strict=False)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(slots=True)
class _Call:
    """The JSON object of a call while it is read; ``start`` is its position in the buffer."""

    start: int
    name: str = ""
    arguments: str | None = None
    closed: bool = False


class AnswerParser:
    """Separates text, reasoning and tool calls of a streamed answer.

    Text is held back only while it may begin markup, or a call whose name is not known yet. Anything
    that is not a call is text, unchanged.

    Attributes:
        num_calls: Calls begun so far.
    """

    def __init__(
        self,
        format: ToolFormat | None,
        names: Collection[str],
        *,
        reasoning: ReasoningFormat | None,
        thinking: bool,
        forced: bool = False,
    ) -> None:
        """Start an answer.

        Args:
            format: How calls are written; ``None`` without tools.
            names: The offered tools. Only bare JSON must name one of them: with markup, any name is a
                call.
            reasoning: How reasoning is written; ``None`` if the model writes none.
            thinking: The prompt has already opened the reasoning.
            forced: A grammar allows nothing but calls, so anything undecided at the end is markup.
        """
        self._format = format
        self._names = frozenset(names)
        self._forced = forced
        self.num_calls = 0
        self._reader = TextReader()
        self._has_text = False
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._deltas: list[ToolCallDelta] = []
        self._arguments: list[str] = []
        self._run = self._answer(reasoning, thinking=thinking)

    def push(self, text: str) -> Parsed:
        """Add the next piece of the answer and return what is certain now."""
        self._reader.buffer += text
        return self._advance()

    def flush(self) -> Parsed:
        """Return the held-back rest; the answer has ended."""
        self._reader.ended = True
        parsed = self._advance()
        return Parsed("", parsed.reasoning, parsed.tool_calls) if self._forced else parsed

    def _advance(self) -> Parsed:
        next(self._run, None)
        self._collect_arguments()
        parsed = Parsed("".join(self._text), "".join(self._reasoning), tuple(self._deltas))
        self._has_text = self._has_text or bool(parsed.text)
        for out in (self._text, self._reasoning, self._deltas):
            out.clear()
        return parsed

    def _answer(self, reasoning: ReasoningFormat | None, *, thinking: bool) -> Reading[None]:
        if reasoning is not None:
            yield from self._thought(reasoning, thinking=thinking)
        form, read = self._format, self._reader
        if form is None:
            yield from read.pass_until((), "", self._text)
            return
        yield from self._unmarked_calls(form)
        marks = (form.mark or _PYTHON_TAG,)  # Llama's calls are bare or follow its tag
        while (yield from read.pass_until(marks, BLANK, self._text)):
            mark_end = read.at
            if not (yield from self._calls(form, bare=False)):
                self._text.append(read.take(mark_end))

    def _thought(self, form: ReasoningFormat, *, thinking: bool) -> Reading[None]:
        read = self._reader
        while (yield from self._thought_begins(form)) or thinking:
            thinking = False
            yield from read.skip("\n")
            read.take()
            yield from read.pass_until((form.end,), "\n", self._reasoning)
            read.take()
            yield from read.skip("\n")
            read.take()

    def _thought_begins(self, form: ReasoningFormat) -> Reading[bool]:
        read = self._reader
        yield from read.skip()
        found = yield from read.step_over(form.begin)
        read.at = read.at if found else 0
        return found

    def _unmarked_calls(self, form: ToolFormat) -> Reading[None]:
        """Read unmarked calls at the beginning of the answer."""
        if form.mark:
            yield from self._whole_answer(form)
        else:
            yield from self._calls(form, bare=True)

    def _whole_answer(self, form: ToolFormat) -> Reading[None]:
        """Read an answer that is one unmarked call and nothing else, perhaps in a code fence.

        Small models forget the markup. Nothing is emitted before the end: if the answer goes on, it is
        text about JSON.
        """
        read = self._reader
        yield from read.skip()
        if (yield from read.step_over(_FENCE)):
            yield from read.skip_over(_IN_FENCE)
            yield from read.skip()
        call = yield from self._named_object(bare=True)
        read.at = 0
        while call is not None and not read.ended:
            yield
        match = _WHOLE_ANSWER.fullmatch(read.buffer) if call is not None else None
        fields = parsed_arguments(match[1]) if match else None
        if match and fields and set(fields) <= set(_CALL_KEYS):
            read.buffer = match[1]
            yield from self._calls(form, bare=True)

    def _calls(self, form: ToolFormat, *, bare: bool) -> Reading[bool]:
        """Read consecutive calls; without any, nothing is taken from the buffer."""
        read = self._reader
        yield from read.skip()
        if not bare and (yield from read.step_over("[")):
            yield from read.skip()
        if form.arguments_mark and (yield from read.peek()) != "{":
            found = yield from self._name_and_arguments(form.arguments_mark)
        else:
            found = yield from self._object(bare=bare)
        any_found = found
        while found:
            read.take()
            yield from read.skip()
            while (yield from read.peek()) in _BETWEEN_CALLS:
                read.at += 1
                read.take()
                yield from read.skip()
            if (yield from read.step_over(form.end_mark)):
                read.take()
                break
            found = yield from self._object(bare=bare)
        read.at = 0
        if any_found:
            yield from self._trim()
        return any_found

    def _trim(self) -> Reading[None]:
        """Drop white space after calls, unless there is text before and after them."""
        read = self._reader
        yield from read.skip()
        if not (yield from read.peek()) or not (self._has_text or any(self._text)):
            read.take()
        read.at = 0

    def _name_and_arguments(self, mark: str) -> Reading[bool]:
        """Read ``name[ARGS]{...}``, perhaps with a call id before the mark."""
        read = self._reader
        start = read.at
        yield from read.skip_over(_IN_NAME)
        name = read.buffer[start : read.at]
        if (yield from read.step_over(_CALL_ID)):
            yield from read.skip_over(_IN_NAME)
        start = read.at
        marked = yield from read.step_over(mark)
        yield from read.skip()
        plain = (yield from read.peek()) == "{"
        if not name or not (marked or plain):
            return False
        self._begin(name)
        yield from self._stream_arguments(read.at if plain else start, broken=not plain)
        return True

    def _object(self, *, bare: bool) -> Reading[bool]:
        """Read ``{"name": ..., "arguments": ...}``, in any order and with other keys."""
        call = yield from self._named_object(bare=bare)
        if call is None:
            return False
        self._begin(call.name)
        if call.arguments is not None:
            self._arguments.append(call.arguments)
        while (yield from self._field(call, bare=False)):
            pass
        if call.arguments is None and not call.closed:
            # Malformed before its arguments: the whole object becomes them, so that the call is not
            # taken for one without arguments.
            yield from self._stream_arguments(call.start, broken=True)
        return True

    def _named_object(self, *, bare: bool) -> Reading[_Call | None]:
        """Read an object until its name is known; ``None`` if it is not a call."""
        read = self._reader
        if (yield from read.peek()) != "{":
            return None
        call = _Call(read.at)
        read.at += 1
        while not call.name:
            if not (yield from self._field(call, bare=bare)):
                return None
        return None if bare and call.name not in self._names else call

    def _field(self, call: _Call, *, bare: bool) -> Reading[bool]:
        """Read one field into ``call``; False at the object's end or if its JSON is malformed."""
        read = self._reader
        yield from read.skip(BLANK + ",")
        first = yield from read.peek()
        if first != '"':
            call.closed = first == "}"
            read.at += call.closed
            return False
        start = read.at
        yield from read.string()
        key = json_text(read.buffer[start : read.at])
        yield from read.skip()
        if not (yield from read.step_over(":")) or (bare and key not in _CALL_KEYS):
            return False
        yield from read.skip()
        start = read.at
        if key in _ARGUMENTS and call.arguments is None:
            return (yield from self._arguments_field(call))
        whole = yield from read.value(self._ends)
        if key == "name" and not call.name:
            call.name = json_text(read.buffer[start : read.at]) if whole else ""
            return bool(call.name)
        return whole

    def _arguments_field(self, call: _Call) -> Reading[bool]:
        read = self._reader
        start = read.at
        if (yield from read.peek()) not in _VALUE_STARTS:
            return False
        if call.name:
            call.arguments = ""
            return (yield from self._stream_arguments(start, broken=False))
        whole = yield from read.value(self._ends)
        call.arguments = read.buffer[start : read.at]
        return whole

    @property
    def _ends(self) -> tuple[str, ...]:
        """Marks that end a call whose brackets or quotes are not closed."""
        form = self._format
        return tuple(mark for mark in (form.end_mark, form.mark) if mark) if form else ()

    def _begin(self, name: str) -> None:
        self._collect_arguments()
        self._deltas.append(ToolCallDelta(self.num_calls, f"call_{secrets.token_hex(12)}", name))
        self.num_calls += 1

    def _stream_arguments(self, start: int, *, broken: bool) -> Reading[bool]:
        """Stream the arguments from ``start``: one value, or the whole rest if ``broken``."""
        read = self._reader
        read.take(start)
        read.at = 0
        read.passing = self._arguments
        whole = yield from (read.rest(self._ends) if broken else read.value(self._ends))
        read.pass_on()
        read.passing = None
        return whole

    def _collect_arguments(self) -> None:
        if text := "".join(self._arguments):
            self._deltas.append(ToolCallDelta(self.num_calls - 1, arguments=text))
        self._arguments.clear()
