"""LlamaIndex's global settings, set to the measures of one LLM."""

from __future__ import annotations

from llama_index.core import Settings
from llama_index.core.indices.prompt_helper import PromptHelper

from rasd_integrations.llama_index.base import RASDLLM


def configure_settings(llm: RASDLLM) -> None:
    """Make ``llm`` LlamaIndex's default, and its tokenizer and window the measure of what fits.

    Without it LlamaIndex packs prompts by the tokens of another model and leaves no room for the chat
    template, so that a context packed to the brim can exceed the window. Loads no weights.

    The mode ``simple_summarize`` stays a risk at the brim: LlamaIndex shows its context as an escaped list,
    which has more tokens than it counts.
    """
    room = llm.metadata.context_window - llm.template_tokens()
    Settings.llm = llm
    Settings.tokenizer = llm.encode
    Settings.prompt_helper = PromptHelper(
        context_window=room, num_output=llm.metadata.num_output, tokenizer=llm.encode
    )
