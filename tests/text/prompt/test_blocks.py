"""Content blocks of other providers: what has text is read, what has none is passed over or refused."""

from __future__ import annotations

import logging

import pytest

from rasd_integrations.errors import PromptError
from rasd_integrations.text.prompt.blocks import block_text, blocks_text

DEEP: dict[str, object] = {"type": "tool_result"}
DEEP["content"] = [DEEP]

WITH_TEXT = [
    ("plain", "plain"),
    ({"type": "text", "text": "a"}, "a"),
    ({"type": "text", "text": None}, ""),
    ({"type": "text-plain", "text": "a", "mime_type": "text/plain"}, "a"),
    ({"type": "output_text", "text": "a", "annotations": []}, "a"),
    ({"type": "refusal", "refusal": "I won't"}, "I won't"),
    ({"type": "executable_code", "executable_code": "print(1)", "language": "PYTHON"}, "print(1)"),
    ({"type": "code_execution_result", "code_execution_result": "1"}, "1"),
    ({"type": "non_standard", "value": {"type": "refusal", "refusal": "no"}}, "no"),
    ({"type": "tool_result", "tool_use_id": "1", "content": "done"}, "done"),
    (
        {
            "type": "search_result",
            "title": "t",
            "content": [{"type": "text", "text": "a"}, {"type": "image"}],
        },
        "a",
    ),
    ({"type": "document", "source": {"type": "text", "data": "whole"}}, "whole"),
]
WITHOUT_TEXT = [
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"query": "q"}},
    {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {"query": "q"}},
    {
        "type": "web_search_tool_result",
        "content": [{"type": "web_search_result", "url": "u", "encrypted_content": "x"}],
    },
    {"type": "image_url", "image_url": "data:image/png;base64,AAAA"},
    {"type": "file", "file": {"file_id": "f"}},
    {"type": "file", "base64": "AAAA", "mime_type": "application/pdf"},
    {"type": "document", "source": {"type": "base64", "data": "AAAA"}},
    {"type": "non_standard", "value": {"type": "web_search_call"}},
    {"type": ["unhashable"]},
    {},
    3,
    DEEP,
]


@pytest.mark.parametrize(("block", "expected"), WITH_TEXT)
def test_blocks_with_text_are_read(block, expected):
    """Fault 12: text is read in any provider's block and any role."""
    assert expected == block_text(block)
    for role in ("assistant", "tool", "user", "system"):
        assert f"{expected}b" == blocks_text([block, "b"], role)


@pytest.mark.parametrize("block", WITHOUT_TEXT)
def test_blocks_without_text_are_passed_over_in_a_history(block, caplog):
    """Fault 12: what an assistant or a tool did elsewhere is left out with one line; what a user shows is refused."""
    for role in ("assistant", "tool"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert "ab" == blocks_text(["a", block, block, "b"], role)
        assert 1 == len(caplog.records)
    for role in ("user", "system"):
        with pytest.raises(PromptError, match="text only"):
            blocks_text([block], role)


def test_what_is_read_elsewhere_is_no_matter_for_the_log(caplog):
    """Blocks that are read elsewhere and cache markers are skipped without a log line."""
    blocks = [{"type": "tool_use", "name": "f"}, "a", {"cachePoint": {"type": "default"}}]
    with caplog.at_level(logging.WARNING):
        assert "a" == blocks_text(blocks[:2], "assistant", {"tool_use"})
        assert "a" == blocks_text(blocks[1:], "user")
    assert not caplog.records
