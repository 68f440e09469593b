"""The LlamaIndex contract: what observers see, and many calls at once."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from contract_setup import (
    FACT,
    FACTS,
    KEY,
    QUESTION,
    STREAMS,
    WAYS,
    ContractSetup,
    chat,
    complete,
    index_of,
    said,
)
from fakes_llama_index import shown
from llama_index.core import PromptTemplate
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.schema import TextNode

ASKED = f"{FACT}\n{QUESTION}"
LONG = f"{'The lighthouse at Cape Wrath stood long. ' * 40}\n{QUESTION}"  # answered at length
ENDPOINTS = pytest.mark.parametrize("endpoint", ["chat", "complete"])
STALL = 0.05
STEP = 0.05


async def call(llm, endpoint, text, way):
    """Call one of the eight endpoints."""
    return await (chat(llm, said(text), way) if endpoint == "chat" else complete(llm, text, way))


class Observers(ContractSetup):
    """Callbacks, events, token counts, settings."""

    @pytest.fixture
    def events(self):
        """Return what is dispatched while the test runs."""
        seen = []

        class Watch(BaseEventHandler):
            def handle(self, event, **_):
                seen.append(event)

        watch, root = Watch(), get_dispatcher()
        root.add_event_handler(watch)
        yield seen
        root.event_handlers.remove(watch)

    @WAYS
    @ENDPOINTS
    async def test_events(self, llm, events, endpoint, way):
        """Start, one in progress for each response of a stream, end with the whole answer."""
        responses = await call(llm, endpoint, ASKED, way)
        kind = "LLMChat" if endpoint == "chat" else "LLMCompletion"
        names = [e.class_name() for e in events if e.class_name().startswith(("LLMChat", kind))]
        middle = [f"{kind}InProgressEvent"] * (len(responses) if "stream" in way else 0)

        assert [f"{kind}StartEvent", *middle, f"{kind}EndEvent"] == names
        end = next(e for e in events if e.class_name() == f"{kind}EndEvent")
        assert str(responses[-1]) == str(end.response)

    @WAYS
    async def test_predict_events(self, llm, events, way):
        """A template's start and, where the answer is whole, its end."""
        template = PromptTemplate("{context_str}\n{query_str}")
        filled = {"context_str": FACT, "query_str": QUESTION}
        if way == "whole":
            llm.predict(template, **filled)
        elif way == "async":
            await llm.apredict(template, **filled)
        elif way == "stream":
            list(llm.stream(template, **filled))
        else:
            [_ async for _ in await llm.astream(template, **filled)]

        names = [e.class_name() for e in events]
        assert "LLMPredictStartEvent" in names
        assert ("LLMPredictEndEvent" in names) is ("stream" not in way)

    @WAYS
    @ENDPOINTS
    async def test_callbacks(self, llm, endpoint, way):
        """One call of an LLM begins and ends, with its prompt and its response."""
        handler = LlamaDebugHandler(print_trace_on_end=False)
        llm.callback_manager = CallbackManager([handler])
        await call(llm, endpoint, ASKED, way)

        ((start, end),) = handler.get_llm_inputs_outputs()
        assert KEY in str(end.payload)
        assert QUESTION in str(start.payload)

    @WAYS
    @ENDPOINTS
    async def test_token_counts(self, llm, endpoint, way):
        """The framework's counter gets the model's own numbers."""
        counter = TokenCountingHandler(tokenizer=lambda _: pytest.fail("counted by itself"))
        llm.callback_manager = CallbackManager([counter])
        responses = await call(llm, endpoint, ASKED, way)

        (prompt,) = self.prompts_read()
        last = responses[-1]
        answer = last.message.content if endpoint == "chat" else last.text
        assert self.count_tokens(prompt) == counter.prompt_llm_token_count
        assert counter.completion_llm_token_count - self.count_tokens(answer) in {0, 1}  # end token

    async def test_token_counts_of_a_pipeline(self, llm, index):
        """Every call of a query engine is counted."""
        counter = TokenCountingHandler(tokenizer=lambda _: pytest.fail("counted by itself"))
        engine = index.as_query_engine(llm=llm, response_mode="refine")
        llm.callback_manager = CallbackManager([counter])  # the engine set the framework's own
        engine.query(QUESTION)

        expected = sum(self.count_tokens(prompt) for prompt in self.prompts_read())
        assert len(self.prompts_read()) == 2
        assert expected == counter.prompt_llm_token_count

    def test_settings_can_be_written_down(self, llm):
        """As plain JSON, with the class's name."""
        data = json.loads(json.dumps(llm.to_dict()))

        assert llm.class_name() == data["class_name"]
        assert llm.class_name() == shown(llm)["class_name"]

    def test_no_secret_is_written_down(self):
        """Credentials and private texts are kept from files and observers."""
        if not self.secret_options:
            pytest.skip("the class is given no secret")
        llm = self.make_llm(**self.secret_options)
        written = f"{llm.to_dict()} {shown(llm)} {llm!r}"

        assert "secret" not in written

    @WAYS
    async def test_a_fault_is_told_to_observers(self, llm, way):
        """A call that fails ends its callback with the error, and the error reaches the caller."""
        handler = LlamaDebugHandler(print_trace_on_end=False)
        llm.callback_manager = CallbackManager([handler])
        too_long = "word " * llm.metadata.context_window
        with pytest.raises(Exception, match=r".") as caught:
            await chat(llm, said(too_long), way)

        ((_, end),) = handler.get_llm_inputs_outputs()
        assert str(caught.value) == str(end.payload["exception"])


class Running(ContractSetup):
    """Event loops, cancelling, many calls at once."""

    @pytest.mark.parametrize("way", ["async", "astream"])
    @ENDPOINTS
    async def test_the_event_loop_goes_on(self, llm, endpoint, way):
        """No other task waits for 50 ms while an answer is decoded."""
        await call(llm, endpoint, "Hello!", way)

        await assert_free(lambda number: call(llm, endpoint, f"Try {number}.\n{LONG}", way))

    async def test_the_event_loop_goes_on_under_a_query(self, llm):
        """A query engine's own work counts too."""
        nodes = [TextNode(text=LONG), *(TextNode(text=text) for text in FACTS)]
        engine = index_of(*nodes).as_query_engine(llm=llm, similarity_top_k=4)
        await engine.aquery("Hello?")

        if self.query_step:
            self.slow_down(self.query_step)
        stall = self.query_step or STALL
        await assert_free(lambda number: engine.aquery(f"{QUESTION} ({number})"), stall)

    @pytest.mark.parametrize("way", ["async", "astream"])
    async def test_cancelling_stops_the_model(self, llm, way):
        """A task that is cancelled leaves the model at rest within a step, and free for others."""
        await call(llm, "chat", "Hello!", way)
        self.slow_down(STEP)
        task = asyncio.create_task(call(llm, "chat", LONG, way))
        await self._started(task)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await self._at_rest()
        assert KEY in llm.complete(ASKED).text

    @STREAMS
    async def test_leaving_a_stream_stops_the_model(self, llm, way):
        """Who reads no further has the model rest."""
        llm.complete("Hello!")
        self.slow_down(STEP)
        if way == "stream":
            stream = llm.stream_chat(said(LONG))
            next(stream)
            stream.close()
        else:
            stream = await llm.astream_chat(said(LONG))
            await anext(stream)
            await stream.aclose()

        await self._at_rest()
        assert KEY in llm.complete(ASKED).text

    async def test_ten_queries_at_once(self, llm, index):
        """Each question gets its own answer."""
        engine = index.as_query_engine(llm=llm, similarity_top_k=1)
        pairs = [(QUESTION, KEY), ("What does sourdough need?", "patience")] * 5
        answers = await asyncio.gather(
            *(engine.aquery(f"{question} ({i})") for i, (question, _) in enumerate(pairs))
        )

        assert [True] * 10 == [
            key in str(answer) for (_, key), answer in zip(pairs, answers, strict=True)
        ]

    async def test_ten_streams_at_once(self, llm):
        """Their pieces do not mix."""
        facts = [f"The tower number {i} was built by mason {chr(65 + i)}." for i in range(10)]
        asked = [f"{fact}\nWho built the tower number {i}?" for i, fact in enumerate(facts)]
        answers = await asyncio.gather(*(call(llm, "chat", text, "astream") for text in asked))

        assert facts == ["".join(r.delta or "" for r in answer) for answer in answers]

    def test_threads_at_once(self, llm):
        """Synchronous calls of several threads are answered each for itself."""
        facts = [f"The tower number {i} was built by mason {chr(65 + i)}." for i in range(4)]
        asked = [f"{fact}\nWho built the tower number {i}?" for i, fact in enumerate(facts)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda text: llm.complete(text).text, asked))

        assert facts == answers

    async def _started(self, task):
        """Wait until the model works on the call."""
        before = self.steps()
        while self.steps() < before + 3:
            assert not task.done()
            await asyncio.sleep(0.001)

    async def _at_rest(self):
        """See that the model does a step more at most, of the hundreds of tokens that it has to say."""
        await asyncio.sleep(2 * STEP)
        before = self.steps()
        await asyncio.sleep(4 * STEP)
        assert before == self.steps()
        self.slow_down(0)


async def assert_free(work, stall=STALL):
    """See that the event loop never waits for ``stall`` seconds while ``work(number)`` is done.

    A busy machine holds up every task: a try counts against what a thread that only spins costs at that moment,
    and one good try of ten will do. Who blocks the loop has none.
    """
    tries = []
    for number in range(10):
        usual = await longest_wait(asyncio.to_thread(spin, 0.1))
        limit = max(stall, 2 * usual)
        tries.append((await longest_wait(work(number)), limit))
        if tries[-1][0] < limit:
            return
    pytest.fail(f"waits in seconds, and what was allowed: {tries}")


async def longest_wait(work):
    """Return the longest time that a task which only wants to run had to wait while ``work`` was done."""
    gc.collect()
    gc.disable()  # a walk through what the tests before have left is no fault of the LLM
    try:
        task = asyncio.ensure_future(work)
        longest, last = 0.0, time.perf_counter()
        while not task.done():
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now
        task.result()
    finally:
        gc.enable()
    return longest


def spin(seconds):
    """Keep a thread busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
