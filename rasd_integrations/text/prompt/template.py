"""Messages and text to token ids: the model's chat template, with control tokens in content kept as data."""

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

_TAIL_TOKENS = 16  # enough for the mark that opens a thought, and white space behind it
# A template is a program: what it raises besides its own refusals comes of data that it does not expect.
_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
)


# What transformers' `apply_chat_template` and the template itself are given by us.
_RESERVED = frozenset(
    {
        "add_generation_prompt", "continue_final_message", "conversation", "conversations", "max_length", "messages",
        "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
        "sanitize_control_tokens", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip


def check_template_options(options: Mapping[str, Any]) -> None:
    """Check ``chat_template_kwargs``.

    Raises:
        ConfigurationError: A name that the template is given by a call, or a template that is no text.
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
    """What a template is given.

    Attributes:
        messages: Plain ones.
        tools: What it is to tell of, if anything.
        variables: The options of the caller that are data.
        goes_on: The last message is the beginning of the answer.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    goes_on: bool


class ChatTemplate:
    """From messages or text to the token ids a model reads. Safe to use from many threads.

    Lone surrogates, which are no Unicode, are read as question marks.

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
        """Return the ids of a conversation, ready for the answer.

        A last message of the assistant is continued instead of answered. Nothing but the template's own
        text is read as control tokens: they stay text inside content, tools, calls, and the names and
        values of ``chat_template_kwargs``, save those that name the tokenizer's own special tokens.

        Raises:
            PromptError: No text, an unknown role, content that is not text, or a conversation that the
                template refuses.
            ModelLoadError: The model has no chat template, or a broken one.
        """
        try:
            given = self._conversation(messages, tools)
            parts = (given.messages, given.tools, given.variables)
            (told, shown, variables), seams = self._encoder.control.cut(parts)
            # Roles choose the template's own text; they are known words.
            told = [{**m, "role": old["role"]} for m, old in zip(told, given.messages, strict=True)]
            cut = replace(given, messages=told, tools=shown, variables=variables)
            return self._encoder.joined(seams.split(self._render(cut)))
        except RecursionError as err:
            raise _too_deep() from err

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Return the conversation as the template writes it; for reading, not for encoding.

        Raises:
            PromptError: As :meth:`encode_messages`.
            ModelLoadError: As :meth:`encode_messages`.
        """
        try:
            return self._render(self._conversation(messages, tools))
        except RecursionError as err:
            raise _too_deep() from err

    def parser(self, tools: ToolUse | None, *, thinking: bool) -> AnswerParser:
        """Return what takes thoughts and calls out of one answer's text.

        Args:
            tools: What the answer may call.
            thinking: Whether the prompt has opened a thought.
        """
        callable_ = tools is not None and bool(tools.visible)
        return AnswerParser(
            self.tool_format if callable_ else None,
            tools.names if tools is not None and callable_ else (),
            reasoning=self.reasoning,
            thinking=thinking,
            forced=bool(tools and tools.forced),
        )

    def opens_thought(self, prompt_ids: Sequence[int], messages: Sequence[Message]) -> bool:
        """Whether the prompt of ``messages`` ends inside a thought.

        The template has begun it, or a last message of the assistant that is continued.
        """
        form, last = self.reasoning, plain_message(messages[-1])
        if form is None:
            return False
        begun = last["content"].strip() if _continued(last) else ""
        size = _TAIL_TOKENS + len(self.encode_chunk(begun))
        tail = self.tokenizer.decode(list(prompt_ids[-size:]), skip_special_tokens=False)
        head = str(tail)[: str(tail).rfind(begun)] if begun else str(tail)
        inside = begun.startswith(form.begin) or opens_thought(head, form)
        return inside and form.end not in begun

    def kept_control(self, tools: ToolUse | None) -> tuple[str, ...]:
        """Return the control tokens that an answer's text must keep for its parser."""
        thoughts = self.reasoning.control if self.reasoning is not None else ()
        calls = self.tool_format.control if tools is not None and tools.visible else ()
        return (*thoughts, *calls)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How this model writes tool calls."""
        return tool_format(self.tokenizer, self._kwargs)

    @cached_property
    def reasoning(self) -> ReasoningFormat | None:
        """How this model marks its thoughts; ``None`` where it has none."""
        return reasoning_format(self.tokenizer, self._kwargs)

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a prompt that is used as it stands, begin-of-sequence once where wanted.

        The text is the caller's own template: control tokens in it are control tokens.

        Raises:
            PromptError: The prompt is empty.
        """
        if not text:
            msg = "The prompt is empty. Give at least one character of text."
            raise PromptError(msg)
        return self._encoder.whole(text)

    def encode_chunk(self, text: str) -> list[int]:
        """Return the ids of a piece of text: no special tokens, and control tokens in it stay text."""
        return self._encoder.data(text)

    def stops(self, stop: Sequence[str], *, chat: bool) -> Stops:
        """Return what ends an answer: the call's stop strings, and after messages the template's own ends."""
        return Stops.of(stop, self._encoder.control, self.turn_ends if chat else ())

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """The tokens that end a turn of a template given as an option, which the model's config cannot know."""
        if not self._own.get("chat_template"):
            return frozenset()
        from rasd_integrations.loading.turns import turn_end_ids  # imports torch

        return turn_end_ids(self.tokenizer, template_text(self.tokenizer, self._own))

    @cached_property
    def exists(self) -> bool:
        """Whether there is a chat template: the tokenizer's own, or one given as an option."""
        return bool(template_text(self.tokenizer, self._kwargs))

    def _conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None
    ) -> _Conversation:
        """Return what the template is given; one that knows no tools gets them as text."""
        plain, form = _checked(messages), self.tool_format
        listed = [plain_data(tool) for tool in tools or ()]
        told, shown = with_tool_prompt(plain, listed, form), template_tools(listed, form)
        return _Conversation(told, shown, self._variables, goes_on=_continued(plain[-1]))

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
            return self._apply_folded(given, refusal)
        if _missing(given.messages, text):  # a template may pass over roles it does not know
            folded = self._folded(given)
            try:
                second = self._apply(folded)
            except _REFUSALS:
                return text
            return text if _missing(folded.messages, second) else second
        return text

    def _folded(self, given: _Conversation) -> _Conversation:
        return replace(given, messages=fold_roles(given.messages, self.tool_format))

    def _apply_folded(self, given: _Conversation, refusal: Exception) -> str:
        try:
            return self._apply(self._folded(given))
        except _REFUSALS:
            msg = f"The model's chat template refuses these messages: {refusal}. Change their roles or order."
            raise PromptError(msg) from refusal

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
    msg = (
        "The messages, tools or template options are nested too deeply to be written. Flatten them."
    )
    return PromptError(msg)


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages:
        msg = "The prompt has no messages. Give at least one."
        raise PromptError(msg)
    plain = [plain_message(message) for message in messages]
    if not any(m["content"].strip() or m.get("tool_calls") for m in plain):
        msg = "The prompt is empty. Give at least one message with text."
        raise PromptError(msg)
    return plain


def _continued(last: Mapping[str, Any]) -> bool:
    """Whether the answer goes on with a last message, rather than being one of its own."""
    return last["role"] == "assistant" and not last.get("tool_calls")


def _missing(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether the words of a message are not in the rendered text, neither as they are nor as JSON.

    Each message has a place of its own: words that stand within another message's are not found there.
    The assistant's own are not looked for: templates drop its thoughts on purpose.
    """
    needed = [
        words for m in messages if m["role"] != "assistant" and (words := m["content"].strip())
    ]
    for words in sorted(needed, key=len, reverse=True):
        forms = (words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1])
        found = next((form for form in forms if form in text), None)
        if found is None:
            return True
        text = text.replace(found, "\0", 1)
    return False
