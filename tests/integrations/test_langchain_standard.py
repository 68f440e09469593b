"""LangChain's own standard tests, as every chat model package runs them."""

from __future__ import annotations

import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.langchain import ChatRASD


class TestChatRASDUnit(ChatModelUnitTests):
    """Construction, options, tracing parameters."""

    @property
    def chat_model_class(self):
        """The class under test."""
        return ChatRASD

    @property
    def chat_model_params(self):
        """A name is enough: construction loads nothing."""
        return {"model": "org/one"}


@pytest.fixture(scope="module")
def loaded():
    return tiny_llama(), tiny_tokenizer()


class TestChatRASDIntegration(ChatModelIntegrationTests):
    """Answers of the real engine round a tiny random model. Tools and structured output come later."""

    @pytest.fixture(autouse=True)
    def _loaded(self, loaded):
        type(self).loaded = loaded

    @property
    def chat_model_class(self):
        """The class under test."""
        return ChatRASD

    @property
    def chat_model_params(self):
        """Random weights; short answers."""
        return {"model": "tiny", "loaded_model": (*type(self).loaded, None)}

    @property
    def standard_chat_model_params(self):
        """As LangChain's, with shorter answers."""
        return {**super().standard_chat_model_params, "max_tokens": 12}
