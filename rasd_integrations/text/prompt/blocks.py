"""The text of content blocks, in whatever provider's form they come."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rasd_integrations.errors import PromptError

logger = logging.getLogger(__name__)

_TEXTS = ("text", "text-plain")
# Blocks whose text is under their own name: what other providers' models said or ran.
_NAMED = ("refusal", "executable_code", "code_execution_result")
_DEPTH = 8  # of blocks within blocks


def blocks_text(content: Sequence[Any] | str, role: str, passed_over: Collection[str] = ()) -> str:
    """Return the text of a message's content.

    In what an assistant or a tool said, blocks without text are passed over, with one line in the log:
    they are what another provider's model did, and no question is asked of them. What a user or a system
    message shows is asked about, so it must be text; marks for caches say nothing and are left out.

    Args:
        content: A text, or blocks.
        role: Whose message it is.
        passed_over: Types of blocks that are read elsewhere, and not logged.

    Raises:
        PromptError: A block without text in a message that is asked about.
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
    """Say once for a message which of its blocks the model does not read."""
    named = ", ".join(map(repr, dict.fromkeys(kinds)))
    logger.warning("A message of the %s has blocks without text, passed over: %s", role, named)


def block_text(block: Any, depth: int = _DEPTH) -> str | None:
    """Return the text that a block holds, also within blocks of its own; ``None`` if it holds none."""
    if isinstance(block, str) or not isinstance(block, Mapping) or depth == 0:
        return block if isinstance(block, str) else None
    kind = _kind(block)
    named = block.get(kind) if kind in _NAMED else None
    own = [text for text in (block.get("text"), named) if isinstance(text, str)]
    if own or kind in _TEXTS:
        return "".join(own[:1])
    source = block.get("source")
    # Another provider's block in LangChain's wrapping, a document's text, results of tools and searches.
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
