"""Makes LlamaIndex pack contexts by the tokens of the model that reads them.

A response synthesizer packs by a :class:`PromptHelper`, which counts with the global tokenizer of another model
unless ``Settings.tokenizer`` was set. German, code and numbers may have 1.6 times as many tokens as it counts.
"""

from __future__ import annotations

import llama_index.core
from llama_index.core import Settings
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.utilities.token_counting import TokenCounter

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.llama_index.options import RASDOptions


class ModelTokenCounter(TokenCounter):
    """Counts text and messages as one LLM reads them."""

    def __init__(self, llm: RASDOptions) -> None:
        """Count with the tokenizer and the chat template of ``llm``."""
        super().__init__(llm.encode)
        self._llm = llm

    def estimate_tokens_in_messages(self, messages: list[ChatMessage]) -> int:
        """Return the tokens of ``messages``, chat template included."""
        return self._llm.count_tokens(messages)


def model_prompt_helper(llm: RASDOptions, like: PromptHelper | None = None) -> PromptHelper:
    """Return a helper that packs by the tokens of ``llm`` and leaves room for its chat template.

    Args:
        llm: Reads what is packed.
        like: Its other options are kept, and its window if smaller than the model's.
    """
    metadata = llm.metadata
    window = metadata.context_window - llm.template_tokens()
    if like is None:
        like = PromptHelper(context_window=window, num_output=metadata.num_output)
    helper = like.model_copy(update={"context_window": min(window, like.context_window)})
    helper._token_counter = ModelTokenCounter(llm)  # noqa: SLF001 - the constructor takes a tokenizer only
    return helper


def pack_by_model(synthesizer: BaseSynthesizer) -> None:
    """Let ``synthesizer`` count by its own LLM, if it is one of ours that can and no other tokenizer was given."""
    llm = synthesizer._llm  # noqa: SLF001 - no public name; absent, the default stays
    if isinstance(llm, StructuredLLM):
        llm = llm.llm
    helper = synthesizer._prompt_helper  # noqa: SLF001
    counts_globally = helper._token_counter.tokenizer is llama_index.core.global_tokenizer  # noqa: SLF001
    if isinstance(llm, RASDOptions) and counts_globally:
        try:
            synthesizer._prompt_helper = model_prompt_helper(llm, helper)  # noqa: SLF001
        except ConfigurationError:
            if llm.base_url is None:  # else the server does not count
                raise


def configure_settings(llm: RASDOptions) -> None:
    """Make ``llm`` LlamaIndex's default, and its tokenizer and window the global ones. Loads no weights.

    Text splitters and memories then count by them; response synthesizers do so without it. The mode
    ``simple_summarize`` may still exceed the window: it shows its context as an escaped list, which has more
    tokens than LlamaIndex counts.
    """
    Settings.llm = llm
    Settings.tokenizer = llm.encode
    Settings.prompt_helper = model_prompt_helper(llm)
