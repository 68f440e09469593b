"""The LlamaIndex contract: query engines and chat engines."""

from __future__ import annotations

import pytest
from contract_setup import FACT, KEY, QUESTION, WAYS, ContractSetup, index_of
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.schema import MetadataMode, TextNode

READERS = ["compact", "refine", "tree_summarize", "simple_summarize"]


async def ask(engine, question, way):
    """Return what a query engine answers in one of its ways."""
    if way == "whole":
        return str(engine.query(question))
    if way == "async":
        return str(await engine.aquery(question))
    if way == "stream":
        return "".join(engine.query(question).response_gen)
    response = await engine.aquery(question)
    return "".join([text async for text in response.async_response_gen()])


async def talk(engine, message, way):
    """Return what a chat engine answers in one of its ways."""
    if way == "whole":
        return str(engine.chat(message))
    if way == "async":
        return str(await engine.achat(message))
    if way == "stream":
        return "".join(engine.stream_chat(message).response_gen)
    response = await engine.astream_chat(message)
    return "".join([text async for text in response.async_response_gen()])


class Synthesizers(ContractSetup):
    """Every response mode of a query engine."""

    @WAYS
    @pytest.mark.parametrize("mode", READERS)
    async def test_a_question_is_answered_from_the_index(self, llm, index, mode, way):
        """The fact that was retrieved is in the answer."""
        engine = index.as_query_engine(llm=llm, response_mode=mode, streaming="stream" in way)

        assert KEY in await ask(engine, QUESTION, way)

    @pytest.mark.parametrize("way", ["whole", "async"])
    @pytest.mark.parametrize("mode", ["accumulate", "compact_accumulate"])
    async def test_each_node_is_asked(self, llm, index, mode, way):
        """The modes that collect answers, which the framework does not stream."""
        engine = index.as_query_engine(llm=llm, response_mode=mode, similarity_top_k=3)
        answer = await ask(engine, QUESTION, way)

        assert KEY in answer
        assert answer.count("Response ") == (3 if mode == "accumulate" else 1)

    @WAYS
    async def test_without_context(self, llm, index, way):
        """The mode that asks the LLM alone."""
        engine = index.as_query_engine(
            llm=llm, response_mode="generation", streaming="stream" in way
        )

        assert await ask(engine, f"{FACT}\n{QUESTION}", way)

    @pytest.mark.parametrize("mode", ["no_text", "context_only"])
    def test_modes_that_ask_no_llm(self, configured, index, mode):
        """They hand the nodes on and have the model read nothing."""
        response = index.as_query_engine(llm=configured, response_mode=mode).query(QUESTION)

        assert FACT == response.source_nodes[0].node.text
        assert [] == self.prompts_read()

    async def test_parts_that_do_not_fit_at_once(self, configured):
        """With the settings made, what exceeds the window is read in several calls, none over it."""
        window = configured.metadata.context_window
        filler = "The keeper of the tower wrote of the wind and the sea again. " * (window // 120)
        nodes = [TextNode(text=f"{filler}\n{FACT}"), *(TextNode(text=filler) for _ in range(5))]
        index = index_of(*nodes)
        engine = index.as_query_engine(similarity_top_k=6, response_mode="tree_summarize")
        answer = str(await engine.aquery(QUESTION))

        assert answer
        prompts = self.prompts_read()
        assert len(prompts) >= 2
        assert max(self.count_tokens(prompt) for prompt in prompts) < window

    async def test_node_text_reaches_the_model_as_shown(self, llm):
        """Metadata for LLMs stands in the prompt, metadata kept from them does not."""
        node = TextNode(
            text=FACT,
            metadata={"file": "capes.txt", "hidden": "tenant-7"},
            excluded_llm_metadata_keys=["hidden"],
        )
        index = index_of(node)
        index.as_query_engine(llm=llm).query(QUESTION)

        (prompt,) = self.prompts_read()
        assert node.get_content(MetadataMode.LLM) in prompt
        assert "tenant-7" not in prompt


class ChatEngines(ContractSetup):
    """Every chat engine that needs no agent."""

    @WAYS
    async def test_simple(self, llm, memory, way):
        """The history is read and written."""
        engine = SimpleChatEngine.from_defaults(llm=llm, memory=memory)
        answer = await talk(engine, f"{FACT}\n{QUESTION}", way)

        assert KEY in answer
        assert ["user", "assistant"] * 2 == [m.role.value for m in memory.get_all()]
        assert answer == memory.get_all()[-1].content

    @WAYS
    async def test_context(self, llm, index, memory, way):
        """The system message holds what was retrieved."""
        engine = ContextChatEngine.from_defaults(
            retriever=index.as_retriever(), llm=llm, memory=memory
        )

        assert KEY in await talk(engine, QUESTION, way)

    @WAYS
    async def test_condense_question(self, llm, index, memory, way):
        """The question is made whole, then put to a query engine."""
        engine = CondenseQuestionChatEngine.from_defaults(
            query_engine=index.as_query_engine(llm=llm, streaming="stream" in way),
            llm=llm,
            memory=memory,
        )
        answer = await talk(engine, QUESTION, way)

        assert answer
        assert answer == memory.get_all()[-1].content
        assert len(self.prompts_read()) == 2

    @WAYS
    async def test_condense_plus_context(self, llm, index, memory, way):
        """The question is made whole to search, and asked as it was said."""
        engine = CondensePlusContextChatEngine.from_defaults(
            retriever=index.as_retriever(), llm=llm, memory=memory
        )
        answer = await talk(engine, QUESTION, way)

        assert answer
        assert QUESTION in self.prompts_read()[-1]

    @WAYS
    async def test_a_second_turn(self, llm, index, memory, way):
        """What was answered is known in the next turn."""
        engine = ContextChatEngine.from_defaults(
            retriever=index.as_retriever(), llm=llm, memory=memory
        )
        first = await talk(engine, QUESTION, way)
        await talk(engine, "What does sourdough need?", way)

        assert first in self.prompts_read()[-1]
        assert ["user", "assistant"] * 3 == [m.role.value for m in memory.get_all()]
