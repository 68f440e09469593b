"""What of our errors reaches the caller of a LlamaIndex pipeline, and that contexts are packed to fit."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from fakes_llama_index import WordEmbedding, since
from llama_index.core import VectorStoreIndex, get_response_synthesizer
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.indices.prompt_helper import PromptHelper
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import TextNode
from llama_index.core.workflow import Context, StartEvent, StopEvent, Workflow, step
from pydantic import BaseModel
from scripted import WINDOW, scripted_model

from rasd_integrations.errors import (
    ConfigurationError,
    ContextOverflowError,
    DecodingError,
    PromptError,
    RASDError,
)
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.llama_index.packing import model_prompt_helper

QUESTION = "Welcher Abschnitt nennt den Schlüssel?"
NOTE = "Abschnitt {0}: Die Überprüfung der Fördermittelbescheide für Gemeindestraßen ergab {0}00 Rückfragen. "


class Filed(BaseModel):
    """An answer with a form."""

    text: str


@pytest.fixture
def seen():
    """Return the prompts that the model read."""
    return []


@pytest.fixture
def llm(seen):
    """Return an LLM that writes its prompts down and answers each with its number."""

    def script(prompt: str) -> str:
        seen.append(prompt)
        return f"Antwort {len(seen)}."

    model, tokenizer = scripted_model(script)
    return RASDLLM.from_model(model, tokenizer, drafter=None, max_tokens=32)


def notes(number: int) -> VectorStoreIndex:
    """Return an index over that many German notes of some 600 tokens."""
    nodes = [TextNode(text=NOTE.format(i) * 6) for i in range(number)]
    return VectorStoreIndex(nodes, embed_model=WordEmbedding())


def overpacking(llm, **options):
    """Return a query engine that packs more than the window holds."""
    helper = PromptHelper(context_window=10**6, tokenizer=str.split)
    synthesizer = get_response_synthesizer(llm=llm, prompt_helper=helper, **options)
    return RetrieverQueryEngine(notes(18).as_retriever(similarity_top_k=18), synthesizer)


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "mode"),
    [(18, "compact"), (21, "compact"), (21, "tree_summarize"), (18, "compact_accumulate")],
)
def test_contexts_are_packed_by_the_models_own_tokens(llm, seen, number, mode):
    """Fault 1: without any settings no chunk is lost and no prompt exceeds the window."""
    engine = notes(number).as_query_engine(llm=llm, similarity_top_k=number, response_mode=mode)
    answer = str(engine.query(QUESTION))

    assert "Antwort" in answer
    missing = [i for i in range(number) if not any(f"Abschnitt {i}:" in p for p in seen)]
    assert [] == missing


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["context", "condense_plus_context"])
async def test_a_chat_engine_packs_its_context_and_counts_its_history(llm, seen, mode):
    """Fault 1: in chat engines the history is counted by the model's tokens as well."""
    history = [
        ChatMessage(role=role, content=NOTE.format(99) * 8)
        for role in ("user", "assistant", "user", "assistant")
    ]
    memory = ChatMemoryBuffer.from_defaults(llm=llm)  # the default one opens a database
    engine = notes(14).as_chat_engine(mode, llm=llm, similarity_top_k=14, memory=memory)
    answer = str(engine.chat(QUESTION, chat_history=history))

    assert "Antwort" in answer
    assert [] == [i for i in range(14) if not any(f"Abschnitt {i}:" in p for p in seen)]
    assert "Antwort" in str(await engine.achat(QUESTION, chat_history=history))


def test_contexts_leave_room_for_the_chat_template(llm):
    """What the template writes around a prompt is no room for context; a smaller window of the user's is kept."""
    assert llm.template_tokens() > 0
    assert model_prompt_helper(llm).context_window == WINDOW - llm.template_tokens()
    assert model_prompt_helper(llm, PromptHelper(context_window=300)).context_window == 300


def test_a_prompt_helper_with_its_own_tokenizer_is_left_alone(llm):
    """Who gives a tokenizer has it used."""
    helper = PromptHelper(context_window=4096, tokenizer=str.split)
    synthesizer = get_response_synthesizer(llm=llm, prompt_helper=helper)
    synthesizer.get_response(QUESTION, ["Kurz."])

    assert synthesizer._prompt_helper is helper


def test_a_smaller_window_of_a_prompt_helper_is_kept(llm):
    """A helper without a tokenizer keeps its other measures."""
    helper = PromptHelper(context_window=4096, num_output=77, chunk_overlap_ratio=0.0)
    synthesizer = get_response_synthesizer(llm=llm, prompt_helper=helper)
    synthesizer.get_response(QUESTION, ["Kurz."])
    own = synthesizer._prompt_helper

    assert (4096, 77, 0.0) == (own.context_window, own.num_output, own.chunk_overlap_ratio)
    assert own._token_counter.get_string_tokens("äöü") == len(llm.encode("äöü"))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structured_answer_filtering": True},
        {"output_cls": Filed},
        {"response_mode": "tree_summarize"},
        {"response_mode": "accumulate"},
    ],
    ids=str,
)
async def test_an_overflow_reaches_the_caller_of_a_query_engine(llm, options, streaming):
    """Fault 1: "Empty Response" hides no error of ours."""
    if options.get("response_mode") == "accumulate":
        if streaming:
            pytest.skip("accumulate does not stream")
        llm.max_tokens = WINDOW
    elif not options.get("response_mode"):
        llm.max_tokens = 300  # room for the shortest object of each schema
    if streaming and options.get("structured_answer_filtering"):
        since("0.14.22")
    engine = overpacking(llm, streaming=streaming, **options)
    with pytest.raises(ContextOverflowError, match=str(WINDOW)) as caught:
        _read(engine.query(QUESTION))
    assert streaming or not isinstance(caught.value, ValueError)
    with pytest.raises(ContextOverflowError, match=str(WINDOW)):
        await _aread(await engine.aquery(QUESTION))


def _read(response):
    return str(
        (getattr(response, "response_gen", None) and list(response.response_gen)) or response
    )


async def _aread(response):
    if hasattr(response, "async_response_gen"):
        return [token async for token in response.async_response_gen()]
    return _read(response)


def test_a_bad_option_reaches_the_caller_of_a_query_engine(llm):
    """Fault 1: ``llm.top_p = 5`` is named, with the error of a direct call as its cause."""
    llm.top_p = 5
    with pytest.raises(DecodingError, match="top_p is 5") as caught:
        notes(2).as_query_engine(llm=llm).query(QUESTION)
    assert isinstance(caught.value.__cause__, ConfigurationError)
    memory = ChatMemoryBuffer.from_defaults(llm=llm)
    with pytest.raises(DecodingError, match="top_p is 5"):
        notes(2).as_chat_engine("context", llm=llm, memory=memory).chat(QUESTION)


async def test_a_bad_option_reaches_the_caller_of_a_workflow(llm):
    """A workflow is a pipeline too: its steps may catch `ValueError` for reasons of their own."""
    llm.top_p = 5

    class Asking(Workflow):
        @step
        async def ask(self, context: Context, event: StartEvent) -> StopEvent:
            with pytest.raises(DecodingError, match="top_p is 5"):
                await llm.acomplete("Hallo")
            return StopEvent(result="asked")

    assert await Asking().run() == "asked"


async def test_a_direct_call_raises_what_a_caller_would_catch(llm):
    """Without a pipeline around it an error is a `ValueError`, whole or streamed, sync or async."""
    llm.max_tokens = WINDOW
    for error in (ContextOverflowError, PromptError, ValueError, RASDError):
        with pytest.raises(error):
            llm.complete("Hallo")
        with pytest.raises(error):
            list(llm.stream_chat([ChatMessage(content="Hallo")]))
        with pytest.raises(error):
            await llm.achat([ChatMessage(content="Hallo")])
        with pytest.raises(error):
            _ = [r async for r in await llm.astream_complete("Hallo")]
