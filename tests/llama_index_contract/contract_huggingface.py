"""The LlamaIndex contract on ``HuggingFaceLLM``: a comparison, run by hand and gating nothing.

See ``examples/benchmarks/llama_index_llms.py``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

pytest.importorskip("llama_index.llms.huggingface")

from contract_model import BOS, WatchedModel
from llama_index.core import Settings
from llama_index.llms.huggingface import HuggingFaceLLM
from llama_index_contract import LLMContract


class TestHuggingFaceLLM(LLMContract):
    """``HuggingFaceLLM`` as its documentation sets it up for a chat model."""

    context_window = WatchedModel.window
    max_tokens_option = "max_new_tokens"
    bos = BOS
    secret_options = MappingProxyType({"model_kwargs": {"token": "hf_secret"}})

    @pytest.fixture(autouse=True)
    def _watched(self) -> None:
        self.watched = WatchedModel()

    def make_llm(self, **options: Any) -> Any:
        """Return the LLM over a new scripted model."""
        tokenizer = self.watched.tokenizer

        def completion_to_prompt(text: str) -> str:
            turn = [{"role": "user", "content": text}]
            return str(
                tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            )

        given = {"completion_to_prompt": completion_to_prompt, **options}
        return HuggingFaceLLM(
            model=self.watched.model,
            tokenizer=tokenizer,
            model_name="scripted",
            tokenizer_name="scripted",
            context_window=WatchedModel.window,
            max_new_tokens=512,
            is_chat_model=True,
            generate_kwargs={"do_sample": False},
            **given,
        )

    def configure(self, llm: Any) -> None:
        """Set what the documentation says to set."""
        Settings.llm = llm
        Settings.tokenizer = self.watched.tokenizer.encode

    def prompts_read(self) -> list[str]:
        """Return what the model was asked."""
        return self.watched.prompts

    def steps(self) -> int:
        """Return the model's forward passes."""
        return self.watched.steps

    def slow_down(self, seconds: float) -> None:
        """Slow the model down."""
        self.watched.delay = seconds

    def count_tokens(self, text: str) -> int:
        """Return the tokens of a text."""
        return self.watched.count_tokens(text)
