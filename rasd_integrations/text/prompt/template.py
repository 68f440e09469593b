"""Encodes messages with the chat template; control tokens in content stay text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from rasd_integrations.errors import ConfigurationError, ModelLoadError, PromptError
from rasd_integrations.response_format import ToolUse
from rasd_integrations.text.answer.parser import (
    AnswerParser,
    ReasoningFormat,
    opens_thought,
    reasoning_format,
)
from rasd_integrations.text.answer.stop import Stops
from rasd_integrations.text.control import plain_data
from rasd_integrations.text.prompt.encoding import TextEncoder
from rasd_integrations.text.prompt.messages import fold_roles, plain_message
from rasd_integrations.text.tool_formats import (
    ToolFormat,
    template_text,
    template_tools,
    tool_format,
    with_tool_prompt,
)
from rasd_integrations.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TAIL_TOKENS = 16  # enough for the mark that opens reasoning and white space after it
# A template is a program: besides its own refusals it may raise any of these on unexpected data.
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
# Arguments of `apply_chat_template` and of the template that each call sets.
_RESERVED = {
    "add_generation_prompt", "continue_final_message", "conversation", "conversations", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
    "sanitize_control_tokens", "tokenizer_kwargs", "tools", "truncation",
}  # fmt: skip


def check_template_options(options: Mapping[str, Any]) -> None:
    """Check ``chat_template_kwargs``.

    Raises:
        ConfigurationError: A name that each call sets itself, or a template that is not text.
    """
    if taken := sorted(_RESERVED.intersection(options)):
        msg = (
            f"chat_template_kwargs has {', '.join(taken)}, which each call sets itself. Leave it out; messages and "
            f"tools go to the call."
        )
        raise ConfigurationError(msg)
    template = options.get("chat_template")
    if template is not None and not (isinstance(template, str) and template):
        msg = f"chat_template_kwargs['chat_template'] is {template!r}, but must be a Jinja template as text."
        raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class _Conversation:
    """The input of a template.

    Attributes:
        messages: Plain messages.
        tools: The tools that the template writes, if any.
        variables: The caller's options that are data.
        goes_on: The last message is the beginning of the answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    goes_on: bool


class ChatTemplate:
    """Encodes messages or text for a model. Thread-safe.

    Lone surrogates, which are not Unicode, are read as question marks.

    Attributes:
        tokenizer: The model's own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap ``tokenizer``; ``chat_template_kwargs`` go straight to its template."""
        self.tokenizer = tokenizer
        self._kwargs = dict(chat_template_kwargs or {})
        own = {"chat_template", *tokenizer.special_tokens_map}
        self._own = {name: value for name, value in self._kwargs.items() if name in own}
        self._variables = {name: value for name, value in self._kwargs.items() if name not in own}
        self._encoder = TextEncoder(tokenizer)

    def encode_messages(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the ids of a conversation, up to where the answer begins.

        A last message of the assistant is continued instead of answered. Control tokens are parsed in the
        template's own text only: they stay text inside content, tools, calls, and ``chat_template_kwargs``
        (except those that name the tokenizer's special tokens).

        Raises:
            PromptError: No text, an unknown role, content that is not text, or a conversation that the
                template refuses.
            ModelLoadError: The model has no chat template, or a broken one.
        """
        try:
            given = self._conversation(messages, tools)
            parts = (given.messages, given.tools, given.variables)
            (turns, listed, variables), seams = self._encoder.control.cut(parts)
            # Roles choose the template's own text; they are known words.
            turns = [
                {**m, "role": old["role"]} for m, old in zip(turns, given.messages, strict=True)
            ]
            cut = replace(given, messages=turns, tools=listed, variables=variables)
            return self._encoder.joined(seams.split(self._render(cut)))
        except RecursionError as err:
            raise _too_deep() from err

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Return the rendered conversation, for reading, not for encoding.

        Raises:
            PromptError: As :meth:`encode_messages`.
            ModelLoadError: As :meth:`encode_messages`.
        """
        try:
            return self._render(self._conversation(messages, tools))
        except RecursionError as err:
            raise _too_deep() from err

    def parser(self, tools: ToolUse | None, *, thinking: bool) -> AnswerParser:
        """Return a parser for one answer that may call ``tools``.

        ``thinking``: the prompt has opened the reasoning.
        """
        offered = tools if tools is not None and tools.visible else None
        return AnswerParser(
            self.tool_format if offered else None,
            offered.names if offered else (),
            reasoning=self.reasoning,
            thinking=thinking,
            forced=bool(tools and tools.forced),
        )

    def opens_thought(self, prompt_ids: Sequence[int], messages: Sequence[Message]) -> bool:
        """Return True if the prompt of ``messages`` ends inside reasoning.

        Either the template or a continued last message of the assistant has opened it.
        """
        form, last = self.reasoning, plain_message(messages[-1])
        if form is None:
            return False
        begun = last["content"].strip() if _is_continued(last) else ""
        size = _TAIL_TOKENS + len(self.encode_chunk(begun))
        tail = self.tokenizer.decode(list(prompt_ids[-size:]), skip_special_tokens=False)
        head = str(tail)[: str(tail).rfind(begun)] if begun else str(tail)
        inside = begun.startswith(form.begin) or opens_thought(head, form)
        return inside and form.end not in begun

    def kept_control(self, tools: ToolUse | None) -> tuple[str, ...]:
        """Return the control tokens that the parser needs in an answer's text."""
        reasoning = self.reasoning.control if self.reasoning is not None else ()
        calls = self.tool_format.control if tools is not None and tools.visible else ()
        return (*reasoning, *calls)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """The model's markup of tool calls."""
        return tool_format(self.tokenizer, self._kwargs)

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """The model's markup of reasoning, if it has any."""
        return reasoning_format(self.tokenizer, self._kwargs)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a plain text prompt, with begin-of-sequence if the model has it.

        The text is the caller's own template: control tokens in it are parsed.

        Raises:
            PromptError: The prompt is empty.
        """
        if not text:
            msg = "The prompt is empty. Give at least one character of text."
            raise PromptError(msg)
        return self._encoder.whole(text)

    def encode_chunk(self, text: str) -> list[int]:
        """Return the ids of data: no special tokens, and control tokens in it stay text."""
        return self._encoder.data(text)

    def stops(self, stop: Sequence[str], *, chat: bool) -> Stops:
        """Return what ends an answer: ``stop``, and in a chat the template's end of turn."""
        return Stops.of(stop, self._encoder.control, self.turn_ends if chat else ())

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """Tokens that end a turn of a template given as an option (the config has the model's own)."""
        if not self._own.get("chat_template"):
            return frozenset()
        from rasd_integrations.loading.turns import turn_end_ids  # imports torch

        return turn_end_ids(self.tokenizer, template_text(self.tokenizer, self._own))

    @cached_property
    def exists(self) -> bool:
        """True if the tokenizer has a chat template or one is given as an option."""
        return bool(template_text(self.tokenizer, self._kwargs))

    def _conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> _Conversation:
        """Return the template's input; a template without tools gets them as text."""
        plain, form = _checked(messages), self.tool_format
        listed = [plain_data(tool) for tool in tools or ()]
        turns, shown = with_tool_prompt(plain, listed, form), template_tools(listed, form)
        return _Conversation(turns, shown, self._variables, goes_on=_is_continued(plain[-1]))

    def _render(self, given: _Conversation) -> str:
        if not self.exists:
            msg = (
                "The model's tokenizer has no chat template. Use a plain text prompt, or pass one with "
                "chat_template_kwargs={'chat_template': ...}."
            )
            raise ModelLoadError(msg)
        try:
            text = self._apply(given)
        except TemplateSyntaxError as err:
            msg = f"The chat template is broken: {err.message} in line {err.lineno}. Correct it."
            raise ModelLoadError(msg) from err
        except _REFUSALS as refusal:
            try:
                return self._apply(self._folded(given))
            except _REFUSALS:
                msg = f"The model's chat template refuses these messages: {refusal}. Change their roles or order."
                raise PromptError(msg) from refusal
        if _missing(given.messages, text):  # a template may ignore roles it does not know
            folded = self._folded(given)
            try:
                second = self._apply(folded)
            except _REFUSALS:
                return text
            return text if _missing(folded.messages, second) else second
        return text

    def _folded(self, given: _Conversation) -> _Conversation:
        return replace(given, messages=fold_roles(given.messages, self.tool_format))

    def _apply(self, given: _Conversation) -> str:
        *before, last = given.messages
        if not given.goes_on:
            return self._template(given, given.messages, add_generation_prompt=True)
        if not last["content"].strip():
            return self._template(given, before, add_generation_prompt=True)
        try:
            return self._template(given, given.messages, continue_final_message=True)
        except ValueError:  # the template rewrites the last message, so its end cannot be found
            head = self._template(given, before, add_generation_prompt=True)
            return f"{head}{last['content']}"

    def _template(self, given: _Conversation, messages: list[dict[str, Any]], **mode: bool) -> str:
        options: Any = {**mode, "tools": given.tools or None, **given.variables, **self._own}
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _too_deep() -> PromptError:
    return PromptError(
        "The messages, tools or template options are nested too deeply to be written. Flatten them."
    )


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages:
        msg = "The prompt has no messages. Give at least one."
        raise PromptError(msg)
    plain = [plain_message(message) for message in messages]
    if not any(m["content"].strip() or m.get("tool_calls") for m in plain):
        msg = "The prompt is empty. Give at least one message with text."
        raise PromptError(msg)
    return plain


def _is_continued(last: Mapping[str, Any]) -> bool:
    """Return True if the answer continues the ``last`` message."""
    return last["role"] == "assistant" and not last.get("tool_calls")


def _missing(messages: list[dict[str, Any]], text: str) -> bool:
    """Return True if a message's content is not in the rendered text, verbatim or as JSON.

    Each message is found at a position of its own. The assistant's are not checked: templates drop its
    reasoning on purpose.
    """
    contents = [m["content"].strip() for m in messages if m["role"] != "assistant"]
    for words in sorted(filter(None, contents), key=len, reverse=True):
        forms = (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
        found = next((form for form in forms if form in text), None)
        if found is None:
            return True
        text = text.replace(found, "\0", 1)
    return False
