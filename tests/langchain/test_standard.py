"""LangChain's own standard tests, as every chat model package runs them: nothing overridden, nothing expected to fail.

The integration tests run on a scripted model inside the real engine: prompts through a chat template with
tools, drafting, verification, grammars, the parser of answers. What they skip needs pictures, sound,
PDFs, recorded web traffic, or a second model behind one address.
"""

from __future__ import annotations

import functools

import pytest
from assistant import standard_model
from langchain_core.messages import HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from scripted import TEMPLATES, scripted_model
from served import engines_over, served

from rasd_integrations.langchain import ChatRASD
from rasd_integrations.runtime.lazy_engine import LoadedName


class TestChatRASDUnit(ChatModelUnitTests):
    """Construction, options, tools, tracing parameters."""

    @property
    def chat_model_class(self):
        """The class under test."""
        return ChatRASD

    @property
    def chat_model_params(self):
        """A name is enough: construction loads nothing."""
        return {"model": "org/one"}


assistant = functools.cache(standard_model)


@functools.cache
def thinker():
    """Return a model that thinks before it answers."""
    model, tokenizer = scripted_model(lambda _: "<think>\nTwo and two.\n</think>\n\nFour.")
    tokenizer.chat_template = TEMPLATES["hermes"] + "{#- <think> </think> -#}"
    return model, tokenizer


class TestChatRASDIntegration(ChatModelIntegrationTests):
    """Answers of the real engine round a scripted model, drafting on."""

    template = "hermes"

    @property
    def chat_model_class(self):
        """The class under test."""
        return ChatRASD

    @property
    def chat_model_params(self):
        """A loaded model."""
        return {"model": LoadedName(*assistant(self.template), None)}

    @property
    def supports_json_mode(self):
        """A grammar of any JSON object."""
        return True

    @property
    def supports_anthropic_inputs(self):
        """Claude's blocks of text, tool use and thinking; pictures are refused."""
        return True

    @property
    def supports_model_override(self):
        """One instance is one model: another name in a call is refused."""
        return False

    @property
    def supported_usage_metadata_details(self):
        """What the engine counts besides prompt and answer."""
        counted = ["cache_read_input", "reasoning_output"]
        return {"invoke": counted, "stream": counted}

    def invoke_with_cache_read_input(self, *, stream=False):
        """Ask twice: the second prompt is found in the prefix cache."""
        llm = self.chat_model_class(**self.chat_model_params)
        prompt = [HumanMessage("The same long question again, word for word. " * 8)]
        llm.invoke(prompt)
        answer = _merged(llm.stream(prompt)) if stream else llm.invoke(prompt)
        assert answer.usage_metadata["input_token_details"]["cache_read"] > 0
        return answer

    def thinking_model(self):
        """Return a model that thinks."""
        return self.chat_model_class.from_model(*thinker())

    def invoke_with_reasoning_output(self, *, stream=False):
        """Ask a model that thinks."""
        llm = self.thinking_model()
        answer = _merged(llm.stream("2 + 2?")) if stream else llm.invoke("2 + 2?")
        assert ("Four.", "Two and two.") == (
            answer.text,
            answer.additional_kwargs["reasoning_content"].strip(),
        )
        assert answer.usage_metadata["output_token_details"]["reasoning"] > 0
        return answer


class TestChatRASDWithoutToolTemplate(TestChatRASDIntegration):
    """The same with a template that knows no tools: the package's own tool prompt takes its place."""

    template = "plain"


class TestChatRASDWithStrictTemplate(TestChatRASDIntegration):
    """The same with a template that takes user and assistant in turns only."""

    template = "strict"


class TestChatRASDOverHTTPUnit(TestChatRASDUnit):
    """Construction with a server, which is not asked."""

    @property
    def chat_model_params(self):
        """An address is enough."""
        return {"base_url": "http://127.0.0.1:9/v1"}


class TestChatRASDOverHTTP(TestChatRASDIntegration):
    """The same answers from another process, as far as it can tell: a server on a real socket."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _servers(cls):
        with (
            served(engines_over(*assistant(cls.template)), name="assistant") as assistants,
            served(engines_over(*thinker()), name="thinker") as thinkers,
        ):
            cls.url, cls.thinker_url = assistants.base_url, thinkers.base_url
            yield

    @property
    def chat_model_params(self):
        """The server's only model."""
        return {"base_url": self.url}

    def thinking_model(self):
        """Return a model that thinks, by its name."""
        return self.chat_model_class("thinker", base_url=self.thinker_url)


def _merged(chunks):
    return functools.reduce(lambda a, b: a + b, chunks)


pytestmark = [
    pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning"),
    pytest.mark.filterwarnings("ignore:.*without effect:UserWarning"),  # options of remote services
]
