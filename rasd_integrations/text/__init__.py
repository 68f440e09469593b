"""Prompts to token ids, and token ids to text, reasoning and tool calls."""

from rasd_integrations.text.answer.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.answer.stop import StopMatcher
from rasd_integrations.text.answer.stream import stream_text
from rasd_integrations.text.prompt.template import ChatTemplate

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopMatcher", "stream_text"]
