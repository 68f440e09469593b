"""LlamaIndex's global settings, set to the measures of one LLM."""

from __future__ import annotations

from llama_index.core import Settings

from rasd_integrations.llama_index.base import RASDLLM
from rasd_integrations.llama_index.packing import model_prompt_helper


def configure_settings(llm: RASDLLM) -> None:
    """Make ``llm`` LlamaIndex's default, and its tokenizer and window the measure of what fits. Loads no weights.

    Response synthesizers pack by the LLM's own tokens without it. With it text splitters and memories, which
    know no LLM, count by them too.

    The mode ``simple_summarize`` stays a risk at the brim: LlamaIndex shows its context as an escaped list,
    which has more tokens than it counts.
    """
    Settings.llm = llm
    Settings.tokenizer = llm.encode
    Settings.prompt_helper = model_prompt_helper(llm)
