"""Extracts the text of content blocks, in any provider's format."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rasd_integrations.errors import PromptError

logger = logging.getLogger(__name__)

_TEXTS = ("text", "text-plain")
# Block types of other providers with their text under the type's name.
_NAMED = ("refusal", "executable_code", "code_execution_result")
_MAX_DEPTH = 8  # of nested blocks


def blocks_text(content: Sequence[Any] | str, role: str, passed_over: Collection[str] = ()) -> str:
    """Return the text of a message's content.

    Blocks without text in assistant and tool messages (another provider's) are skipped with a log line.
    In other messages the model is asked about them, so they are refused, except cache markers.

    Args:
        content: A text, or blocks.
        role: The message's role.
        passed_over: Block types that are read elsewhere; skipped without a log line.

    Raises:
        PromptError: A block without text in a system or user message.
    """
    if isinstance(content, str):
        return content
    texts: list[str] = []
    left_out: list[str] = []
    for block in content:
        kind = _kind(block)
        if kind in passed_over:
            continue
        text = block_text(block)
        if text is not None:
            texts.append(text)
        elif role in ("assistant", "tool"):
            left_out.append(kind)
        elif kind != "cachePoint":
            msg = (
                f"A message of the {role} has a content block of type {kind!r}, but this model reads text "
                f"only. Send its text as a 'text' block, or remove it."
            )
            raise PromptError(msg)
    if left_out:
        log_passed_over(role, left_out)
    return "".join(texts)


def log_passed_over(role: str, kinds: Sequence[str]) -> None:
    """Log the types of a message's blocks that the model does not read."""
    named = ", ".join(map(repr, dict.fromkeys(kinds)))
    logger.warning("A message of the %s has blocks without text, passed over: %s", role, named)


def block_text(block: Any, depth: int = _MAX_DEPTH) -> str | None:
    """Return the text of a block and its nested blocks; ``None`` if there is none."""
    if isinstance(block, str) or not isinstance(block, Mapping) or depth == 0:
        return block if isinstance(block, str) else None
    kind = _kind(block)
    named = block.get(kind) if kind in _NAMED else None
    own = [text for text in (block.get("text"), named) if isinstance(text, str)]
    if own or kind in _TEXTS:
        return "".join(own[:1])
    source = block.get("source")
    # LangChain's wrapper of other providers' blocks, a document's text, results of tools and searches.
    parts = [block.get("value") if kind == "non_standard" else None]
    if isinstance(source, Mapping) and source.get("type") == "text":
        parts.append(source.get("data"))
    inner = block.get("content")
    parts += inner if isinstance(inner, list | tuple) else [inner]
    found = [t for part in parts if (t := block_text(part, depth - 1)) is not None]
    return "".join(found) if found else None


def _kind(block: Any) -> str:
    if isinstance(block, str):
        return "text"
    if not isinstance(block, Mapping):
        return type(block).__name__
    return "cachePoint" if "cachePoint" in block else str(block.get("type"))
