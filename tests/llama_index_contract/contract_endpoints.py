"""The LlamaIndex contract: endpoints, prompts and options."""

from __future__ import annotations

import pytest
from contract_setup import (
    FACT,
    KEY,
    QUESTION,
    STREAMS,
    WAYS,
    ContractSetup,
    chat,
    complete,
    said,
    text_of,
)
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.llms import LLM

ASKED = f"{FACT}\n{QUESTION}"
UNICODE = "Das Café „Zürich“ am 灯台 🗼 wurde 1901 eröffnet."
UNICODE_ASKED = f"{UNICODE}\nWann wurde das Café „Zürich“ eröffnet?"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEMPLATE = PromptTemplate("{context_str}\n{query_str}")
FILLED = {"context_str": FACT, "query_str": QUESTION}


class Endpoints(ContractSetup):
    """The eight endpoints and the metadata."""

    def test_is_an_llm(self, llm):
        """The framework takes it wherever it takes an LLM."""
        assert isinstance(llm, LLM)
        assert llm.class_name() != LLM.class_name()

    def test_metadata(self, llm):
        """The window is the model's own; the rest can be told of a chat model."""
        metadata = llm.metadata

        assert metadata.is_chat_model
        assert metadata.model_name not in {"", "unknown"}
        assert 0 < metadata.num_output < metadata.context_window
        assert self.context_window in {None, metadata.context_window}

    @WAYS
    async def test_chat(self, llm, way):
        """A question over a fact is answered, and the answer is the assistant's."""
        responses = await chat(llm, said(ASKED), way)

        assert KEY in text_of(responses)
        assert responses[-1].message.role == "assistant"

    @WAYS
    async def test_complete(self, llm, way):
        """A plain text is answered as what a user says."""
        assert KEY in text_of(await complete(llm, ASKED, way))

    @WAYS
    async def test_all_ways_give_one_answer(self, llm, way):
        """Chat and completion, in each way, answer the same."""
        whole = llm.chat(said(ASKED)).message.content

        assert whole == text_of(await chat(llm, said(ASKED), way))
        assert whole == text_of(await complete(llm, ASKED, way))

    @STREAMS
    async def test_streams_hold_the_answer_so_far(self, llm, way):
        """Each response has all text until now, and what is new as its delta."""
        for responses in (await chat(llm, said(ASKED), way), await complete(llm, ASKED, way)):
            so_far = ""
            for response in responses:
                so_far += response.delta or ""
                assert text_of([response]) == so_far
            assert len([r for r in responses if r.delta]) >= 3

    @WAYS
    async def test_earlier_turns_are_read(self, llm, way):
        """What was said before counts, system message and all."""
        talk = [*said("Be brief.", "system"), *said(FACT), *said("I see.", "assistant")]

        assert KEY in text_of(await chat(llm, [*talk, *said(QUESTION)], way))

    async def test_all_blocks_of_a_message_are_read(self, llm):
        """A message of several text blocks is read whole."""
        message = ChatMessage(role="user", blocks=[TextBlock(text=FACT), TextBlock(text=QUESTION)])

        assert KEY in llm.chat([message]).message.content

    @WAYS
    async def test_letters_of_several_bytes(self, llm, way):
        """No letter is torn, however the pieces fall."""
        responses = await chat(llm, said(UNICODE_ASKED), way)

        assert "灯台 🗼" in text_of(responses)
        assert not any("\ufffd" in (r.delta or "") for r in responses)

    async def test_an_answer_says_nothing_of_the_prompt(self, llm):
        """Neither the prompt nor control tokens are part of it."""
        answer = llm.complete(ASKED).text

        assert QUESTION not in answer
        assert "<|" not in answer


class Prompts(ContractSetup):
    """What the model reads."""

    @WAYS
    async def test_predict(self, llm, way):
        """A filled template is answered, whole or in pieces."""
        if way == "whole":
            answer = llm.predict(TEMPLATE, **FILLED)
        elif way == "async":
            answer = await llm.apredict(TEMPLATE, **FILLED)
        elif way == "stream":
            answer = "".join(llm.stream(TEMPLATE, **FILLED))
        else:
            answer = "".join([text async for text in await llm.astream(TEMPLATE, **FILLED)])

        assert KEY in answer

    @WAYS
    @pytest.mark.parametrize("endpoint", ["chat", "complete"])
    async def test_the_prompt_begins_once(self, llm, way, endpoint):
        """Not two tokens that begin a text, one of the template and one of the tokenizer."""
        if self.bos is None:
            pytest.skip("the model's texts begin with no token of their own")
        await (chat(llm, said("Hello!"), way) if endpoint == "chat" else complete(llm, "Hi!", way))

        (prompt,) = self.prompts_read()
        assert prompt.startswith(self.bos)
        assert prompt.count(self.bos) == 1

    @WAYS
    async def test_a_completion_is_a_users_turn(self, llm, way):
        """Each way of completion has the model read what a chat of one message has."""
        await complete(llm, "Hello!", way)
        llm.chat(said("Hello!"))

        assert len(set(self.prompts_read())) == 1

    @WAYS
    async def test_a_formatted_prompt_is_read_as_it_stands(self, llm, way):
        """No template and no system prompt is put round it."""
        text = TURN.format("Hello there!")
        await complete(llm, text, way, formatted=True)

        (prompt,) = self.prompts_read()
        assert text == prompt.removeprefix(self.bos or "")

    @WAYS
    async def test_the_system_prompt_is_read_once(self, way):
        """The LLM's own system prompt stands before templates and completions, in each way."""
        llm = self.make_llm(system_prompt="Answer like a sailor.")
        await complete(llm, "Hello!", way)
        llm.predict(TEMPLATE, **FILLED)

        prompts = self.prompts_read()
        assert len(prompts) == 2
        assert [1, 1] == [prompt.count("Answer like a sailor.") for prompt in prompts]

    @WAYS
    async def test_a_hand_written_prompt_is_used(self, way):
        """``messages_to_prompt`` and ``completion_to_prompt`` make the prompts, in each way."""
        llm = self.make_llm(
            messages_to_prompt=lambda messages: TURN.format(f"{len(messages)} said"),
            completion_to_prompt=lambda text: TURN.format(f"{len(text)} long"),
        )
        await chat(llm, said("Hello!"), way)
        await complete(llm, "Hello!", way)

        read = [prompt.removeprefix(self.bos or "") for prompt in self.prompts_read()]
        assert [TURN.format("1 said"), TURN.format("6 long")] == read


class Options(ContractSetup):
    """Options of a call: honoured or refused, never ignored."""

    @WAYS
    async def test_the_longest_answer(self, llm, way):
        """A limit given to one call holds for it, and for it alone."""
        whole = llm.chat(said(ASKED)).message.content
        short = text_of(await chat(llm, said(ASKED), way, **{self.max_tokens_option: 5}))

        assert whole.startswith(short)
        assert 0 < len(short) < len(whole)
        assert whole == llm.chat(said(ASKED)).message.content

    @WAYS
    @pytest.mark.parametrize("several", [False, True])
    async def test_stop_strings(self, llm, way, several):
        """The answer ends before the stop string, in streams too, however it falls into tokens."""
        whole = llm.chat(said(ASKED)).message.content
        at = len(whole) // 2
        stop = whole[at : at + 7]
        given = {self.stop_option: ["never said", stop] if several else stop}
        responses = await chat(llm, said(ASKED), way, **given)

        assert whole.partition(stop)[0] == text_of(responses)
        if "stream" in way:
            assert whole.partition(stop)[0] == "".join(r.delta or "" for r in responses)

    @WAYS
    async def test_an_unknown_option_is_refused(self, llm, way):
        """A typing error is told, not swallowed."""
        with pytest.raises((TypeError, ValueError), match="temprature"):
            await chat(llm, said("Hello!"), way, temprature=0.5)

    async def test_a_prompt_over_the_window_is_refused(self, llm):
        """The error names the window; nothing is cut in silence, and the next call works."""
        with pytest.raises(ValueError, match=str(llm.metadata.context_window)):
            llm.complete("word " * llm.metadata.context_window)

        assert KEY in llm.complete(ASKED).text
