"""Messages and text to token ids: the model's chat template, with control tokens in content kept as data."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from rasd_integrations.errors import ModelLoadError, PromptError
from rasd_integrations.response_format import ToolUse
from rasd_integrations.text.answer.parser import (
    AnswerParser,
    ReasoningFormat,
    opens_thought,
    reasoning_format,
)
from rasd_integrations.text.prompt.control import ControlTokens
from rasd_integrations.text.prompt.messages import fold_roles, plain_message
from rasd_integrations.text.tool_formats import (
    ToolFormat,
    template_tools,
    tool_format,
    with_tool_prompt,
)
from rasd_integrations.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHOR = "\n"
_TAIL_TOKENS = 16  # enough for the mark that opens a thought, and white space behind it

# Fast tokenizers raise "Already borrowed" when two threads change their settings at once, and one
# tokenizer may serve several templates.
_locks: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, threading.Lock] = (
    weakref.WeakKeyDictionary()
)
_locks_guard = threading.Lock()


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
        with _locks_guard:
            self._lock = _locks.setdefault(tokenizer, threading.Lock())
        self._control = ControlTokens(tokenizer)
        bos = tokenizer.bos_token_id
        starts_with_bos = bos is not None and self._ids("", special=True)[:1] == [bos]
        self._bos: list[int] = [bos] if starts_with_bos else []
        self._anchor = self._ids(_ANCHOR)
        # Sentencepiece writes a space before every text it is given, also before the rest of a cut one.
        self._adds_space = self._ids("a") != self._ids(f"{_ANCHOR}a")[len(self._anchor) :]

    def encode_messages(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> list[int]:
        """Return the ids of a conversation, ready for the answer.

        A last message of the assistant is continued instead of answered. Control tokens written inside
        content, tools or tool calls stay text.

        Raises:
            PromptError: No text, an unknown role, content that is not text, or a conversation that the
                template refuses.
            ModelLoadError: The model has no chat template.
        """
        plain, shown = self._with_tools(_checked(messages), tools)
        conversation, mark = self._control.cut((plain, shown))
        return self._encode_cut(self._render(*conversation).split(mark))

    def render(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        """Return the conversation as the template writes it; for reading, not for encoding.

        Raises:
            PromptError: As :meth:`encode_messages`.
            ModelLoadError: The model has no chat template.
        """
        return self._render(*self._with_tools(_checked(messages), tools))

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

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends inside a thought that the template has begun."""
        if self.reasoning is None:
            return False
        tail = self.tokenizer.decode(list(prompt_ids[-_TAIL_TOKENS:]), skip_special_tokens=False)
        return opens_thought(str(tail), self.reasoning)

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
        ids = self._ids(text)
        return ids if ids[: len(self._bos)] == self._bos else self._bos + ids

    def encode_chunk(self, text: str) -> list[int]:
        """Return the ids of a piece of text: no special tokens, and control tokens in it stay text."""
        cut, mark = self._control.cut(text)
        return self._encode_cut(cut.split(mark))

    def _with_tools(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[list[dict[str, Any]], Sequence[Mapping[str, Any]] | None]:
        """Return what the template is given; one that knows no tools gets them as text."""
        form = self.tool_format
        return with_tool_prompt(messages, tools or (), form), template_tools(tools or (), form)

    def _render(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> str:
        if not (self.tokenizer.chat_template or "chat_template" in self._kwargs):
            msg = (
                "The model's tokenizer has no chat template. Use a plain text prompt, or pass one with "
                "chat_template_kwargs={'chat_template': ...}."
            )
            raise ModelLoadError(msg)
        try:
            text = self._apply(messages, tools)
        except TemplateError as refusal:
            return self._apply_folded(messages, tools, refusal)
        if _missing(messages, text):  # a template may pass over roles it does not know, in silence
            folded = fold_roles(messages, self.tool_format)
            try:
                second = self._apply(folded, tools)
            except TemplateError:
                return text
            return text if _missing(folded, second) else second
        return text

    def _apply_folded(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        refusal: TemplateError,
    ) -> str:
        try:
            return self._apply(fold_roles(messages, self.tool_format), tools)
        except TemplateError:
            msg = f"The model's chat template refuses these messages: {refusal}. Change their roles or order."
            raise PromptError(msg) from refusal

    def _apply(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> str:
        last = messages[-1]
        prefill = last["role"] == "assistant" and not last.get("tool_calls")
        if not prefill:
            return self._template(messages, tools, add_generation_prompt=True)
        if not last["content"].strip():
            return self._template(messages[:-1], tools, add_generation_prompt=True)
        try:
            return self._template(messages, tools, continue_final_message=True)
        except ValueError:  # the template rewrites the last message, so its end cannot be found
            head = self._template(messages[:-1], tools, add_generation_prompt=True)
            return f"{head}{last['content']}"

    def _template(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        **mode: bool,
    ) -> str:
        options = {**mode, **self._kwargs}
        listed: Any = list(tools) if tools else None
        return str(
            self.tokenizer.apply_chat_template(messages, tools=listed, tokenize=False, **options)
        )

    def _encode_cut(self, parts: list[str]) -> list[int]:
        ids = self._ids(parts[0])
        for part in parts[1:]:
            ids.extend(self._continued(part))
        return ids

    def _continued(self, text: str) -> list[int]:
        """Return the ids of a text that goes on after another, without the space of a beginning."""
        if self._adds_space:
            ids = self._ids(_ANCHOR + text)
            if ids[: len(self._anchor)] == self._anchor:
                return ids[len(self._anchor) :]
        return self._ids(text)

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # lone surrogates are no text: "?"
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=special, verbose=False))


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    if not messages:
        msg = "The prompt has no messages. Give at least one."
        raise PromptError(msg)
    plain = [plain_message(message) for message in messages]
    if not any(m["content"].strip() or m.get("tool_calls") for m in plain):
        msg = "The prompt is empty. Give at least one message with text."
        raise PromptError(msg)
    return plain


def _missing(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether the words of a message are not in the rendered text, neither as they are nor as JSON.

    The assistant's own are not looked for: templates drop its thoughts on purpose.
    """
    needed = [m["content"].strip() for m in messages if m["role"] != "assistant"]
    return not all(
        words in text
        or json.dumps(words)[1:-1] in text
        or json.dumps(words, ensure_ascii=False)[1:-1] in text
        for words in needed
    )
