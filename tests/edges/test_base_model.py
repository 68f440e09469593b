"""A base model, which has no chat template, behaves behind a server as in process."""

from __future__ import annotations

import pytest
from fake_server import ANSWER, OTHER, RASD, VLLM, Says, fake_server
from served import engines_over, served
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import ConfigurationError, ModelLoadError
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.serving.client.connection import ServerOptions
from rasd_integrations.serving.client.remote import RemoteRASD

WAYS = pytest.mark.parametrize("way", ["sync", "async", "stream"])


@pytest.fixture(scope="module")
def base():
    """Serve a model without a template whose checkpoint wants answers of nine tokens; return it and the server."""
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    tokenizer.chat_template = None
    model.generation_config.max_new_tokens = 9
    with served(engines_over(model, tokenizer), name="tiny") as server:
        yield (model, tokenizer), server


def both(cls, base, **options):
    """Return a class's model behind the server, and the same in this process."""
    parts, server = base
    return cls(base_url=server.base_url, **options), cls.from_model(*parts, **options)


def remote(server, **options):
    return RemoteRASD(ServerOptions(base_url=server.base_url, max_retries=0), **options)


# --- what a server says ---


def test_our_server_says_what_a_client_cannot_know(base):
    """Template, thoughts, and the checkpoint's longest answer; a client needs one question for all."""
    _, server = base
    engine = remote(server)
    assert (False, False, 9) == (
        engine.has_chat_template,
        engine.has_reasoning,
        engine.max_tokens,
    )
    engine.close()


def test_a_model_with_thoughts_says_so():
    """Its template writes them; the server's limit is shorter than the checkpoint's answers."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template += "{# <think></think> #}"
    with served(engines_over(tiny_llama(), tokenizer), answer_tokens=5) as server:
        engine = remote(server)
        assert (True, True, 5) == (
            engine.has_chat_template,
            engine.has_reasoning,
            engine.max_tokens,
        )
        engine.close()


CARDS = {
    "another's": OTHER, "vLLM": VLLM, "ours, before it says": RASD, "no object": {**RASD, "rasd": 3},
    "no values": {**RASD, "rasd": {"chat_template": None, "reasoning": 1.5, "max_tokens": "x"}},
    "another's field": {**OTHER, "rasd": {"chat_template": False, "reasoning": True, "max_tokens": 3}},
}  # fmt: skip


@pytest.mark.parametrize("case", CARDS)
def test_what_is_not_said_has_its_default(case):
    """A server is then taken to have a template, no thoughts, and answers of 512 tokens."""
    with fake_server(cards=[CARDS[case]]) as server:
        engine = remote(server)
        assert (True, False, 512) == (
            engine.has_chat_template,
            engine.has_reasoning,
            engine.max_tokens,
        )
        engine.close()


def test_a_template_of_the_clients_own_is_one(base):
    """It travels with each request, so messages can be formatted."""
    _, server = base
    engine = remote(server, chat_template_kwargs={"chat_template": tiny_tokenizer().chat_template})
    assert engine.has_chat_template
    asked = Request(
        [{"role": "user", "content": "Who?"}], SamplingParams(max_tokens=3, ignore_eos=True)
    )
    assert engine.generate(asked).stats.generated_tokens == 3
    engine.close()


# --- LangChain ---


@WAYS
async def test_langchains_texts_are_the_same(base, way):
    """Plain texts need no template; without max_tokens, both end at the checkpoint's."""
    pytest.importorskip("langchain_core")
    from rasd_integrations.langchain import RASDLLM

    said = [await _told(llm, way) for llm in both(RASDLLM, base)]
    assert said[0] == said[1]
    assert said[0]


async def _told(llm, way):
    if way == "async":
        return await llm.ainvoke("Once upon")
    if way == "sync":
        return llm.invoke("Once upon")
    return "".join(getattr(piece, "content", piece) for piece in llm.stream("Once upon"))


@WAYS
async def test_langchains_chats_are_refused_alike(base, way):
    """The error says what to do."""
    pytest.importorskip("langchain_core")
    from rasd_integrations.langchain import ChatRASD

    said = []
    for llm in both(ChatRASD, base):
        with pytest.raises(ModelLoadError, match="no chat template") as caught:
            await _told(llm, way)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_langchains_profile_is_the_same(base):
    """Once loaded, it knows the longest answer and the longest prompt."""
    pytest.importorskip("langchain_core")
    from rasd_integrations.langchain import ChatRASD

    there, here = (llm.load().profile for llm in both(ChatRASD, base))
    assert there == here
    assert there["max_input_tokens"] == 2048 - 9


# --- LlamaIndex ---


@WAYS
@pytest.mark.parametrize("call", ["chat", "complete"])
async def test_llama_indexs_answers_are_the_same(base, call, way):
    """Messages become a text, as LlamaIndex writes them without a template."""
    pytest.importorskip("llama_index.core")
    from llama_index.core.llms import ChatMessage

    from rasd_integrations.llama_index import RASDLLM

    given = "Once upon" if call == "complete" else [ChatMessage(content="Once upon")]
    said = []
    for llm in both(RASDLLM, base):
        if way == "async":
            told = await getattr(llm, f"a{call}")(given)
        elif way == "sync":
            told = getattr(llm, call)(given)
        else:
            *_, told = getattr(llm, f"stream_{call}")(given)
        said.append(str(told))
    assert said[0] == said[1]
    assert said[0]


def test_llama_indexs_metadata_and_counts_are_the_same(base):
    """It is no chat model, so the framework writes its prompts as texts."""
    pytest.importorskip("llama_index.core")
    from llama_index.core.llms import ChatMessage

    from rasd_integrations.llama_index import RASDLLM

    there, here = both(RASDLLM, base)
    known, expected = (llm.metadata.model_dump() for llm in (there, here))
    assert {**known, "model_name": ""} == {**expected, "model_name": ""}
    assert (False, False, 9) == (
        known["is_chat_model"],
        known["is_function_calling_model"],
        known["num_output"],
    )
    asked = [ChatMessage(content="Who?")]
    assert here.count_tokens(asked) == there.count_tokens(asked) > 4
    assert here.template_tokens() == there.template_tokens()


def test_llama_indexs_tools_are_refused_alike(base):
    """It cannot be told of tools; the error names them."""
    pytest.importorskip("llama_index.core")
    from llama_index.core.tools import FunctionTool

    from rasd_integrations.llama_index import RASDLLM

    def find(name: str) -> str:
        """Find a name."""
        return name

    tool = FunctionTool.from_defaults(find)
    for llm in both(RASDLLM, base):
        with pytest.raises(ConfigurationError, match="tools find: it has no chat template"):
            llm.chat_with_tools([tool], "Who?")


def test_a_server_that_does_not_say_is_sent_messages():
    """As before: most servers have a template."""
    pytest.importorskip("llama_index.core")
    from rasd_integrations.llama_index import RASDLLM

    with fake_server(Says(ANSWER), cards=[OTHER]) as server:
        RASDLLM(base_url=server.base_url).complete("Who?")
    assert server.paths[-1] == "/v1/chat/completions"
