"""Counts the tokens of prompts and their parts, without refusing any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rasd_integrations.errors import PromptError
from rasd_integrations.text.prompt.template import ChatTemplate
from rasd_integrations.types import Message


def count_text(template: ChatTemplate, text: str) -> int:
    """Return the number of tokens of a plain text prompt."""
    return len(template.encode_text(text)) if text else 0


def count_messages(
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> int:
    """Return the number of tokens of messages and tools in the chat template.

    Messages that the template refuses (no text, a part of a conversation, an unknown role) are counted one by
    one, each with the template's own tokens for a message.

    Raises:
        ModelLoadError: The model has no chat template.
    """
    if not messages:
        return 0
    try:
        return len(template.encode_messages(messages, tools=tools))
    except PromptError:
        letter = len(template.encode_chunk("a"))
        around = len(template.encode_messages([{"role": "user", "content": "a"}], tools=tools))
        return sum(
            len(template.encode_chunk(_words(message))) + around - letter for message in messages
        )


def _words(message: Message) -> str:
    content = message.get("content") or ""
    blocks = [content] if isinstance(content, str) else content
    texts = [b if isinstance(b, str) else str(dict(b).get("text") or "") for b in blocks]
    calls = message.get("tool_calls")
    return "".join(texts) + (json.dumps(calls, default=str) if calls else "")
