"""Text in, text out: the chat template, incremental detokenising, stop strings."""

from rasd_integrations.text.detokenizer import IncrementalDetokenizer
from rasd_integrations.text.stop import StopMatcher
from rasd_integrations.text.stream import stream_text
from rasd_integrations.text.template import ChatTemplate

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "StopMatcher", "stream_text"]
