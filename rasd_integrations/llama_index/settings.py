"""Sets LlamaIndex's global settings for one LLM."""

from __future__ import annotations

from llama_index.core import Settings

from rasd_integrations.llama_index.base import RASDLLM
from rasd_integrations.llama_index.packing import model_prompt_helper


def configure_settings(llm: RASDLLM) -> None:
    """Make ``llm`` LlamaIndex's default, and its tokenizer and window the global ones. Loads no weights.

    Text splitters and memories then count by them; response synthesizers do so without it. The mode
    ``simple_summarize`` may still exceed the window: it shows its context as an escaped list, which has more
    tokens than LlamaIndex counts.
    """
    Settings.llm = llm
    Settings.tokenizer = llm.encode
    Settings.prompt_helper = model_prompt_helper(llm)
