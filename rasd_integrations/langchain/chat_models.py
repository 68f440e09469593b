"""The LangChain chat model: `_stream` and its asynchronous form; the other calls join them."""

from __future__ import annotations

from importlib.util import find_spec
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

from langchain_core.language_models import BaseChatModel, ModelProfile
from langchain_core.outputs import ChatGeneration

from rasd_integrations.config import SAMPLING_DEFAULTS
from rasd_integrations.langchain.base import RASDModel
from rasd_integrations.langchain.message_chunks import (
    MessageChunks,
    mark_invalid_calls,
    whole_answer,
)
from rasd_integrations.langchain.messages import template_messages
from rasd_integrations.langchain.structured_output import Method, structured_output
from rasd_integrations.langchain.tools import openai_tool, take_tool_use

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from langchain_core.callbacks import (
        AsyncCallbackManagerForLLMRun,
        CallbackManagerForLLMRun,
    )
    from langchain_core.language_models import LanguageModelInput
    from langchain_core.messages import AIMessage, BaseMessage
    from langchain_core.outputs import ChatGenerationChunk, ChatResult, LLMResult
    from langchain_core.runnables import Runnable, RunnableConfig
    from typing_extensions import Self

    from rasd_integrations.langchain.tools import Tool


class ChatRASD(RASDModel, BaseChatModel):
    """A local chat model with speculative decoding.

    By default drafts come from the prompt's own text. `drafter="self"`, a small model or a `DatastoreDrafter` also
    drafts from what the chain has retrieved, or from a collection. Drafts change the time only, not the answer.

    Setup:
        ```bash
        pip install -e '.[langchain]'  # in a clone
        ```

    Instantiate:
        ```python
        from rasd_integrations.langchain import ChatRASD

        llm = ChatRASD(model="Qwen/Qwen3-8B", temperature=0, max_tokens=256)
        ```

    Instantiate, for a model behind `rasd serve`, vLLM or another server:
        ```python
        llm = ChatRASD(base_url="http://localhost:8000/v1")
        ```

    Invoke:
        ```python
        answer = llm.invoke([("system", "Answer briefly."), ("human", "Who wrote it?")])
        answer.content
        answer.usage_metadata
        answer.response_metadata["rasd"]["mean_acceptance_length"]
        ```

    Stream:
        ```python
        for chunk in llm.stream("Who wrote it?"):
            print(chunk.text, end="")
        ```

    Async:
        ```python
        await llm.ainvoke("Who wrote it?")
        ```

    Retrieval, with drafts from the retrieved chunks:
        ```python
        llm = ChatRASD(model="Qwen/Qwen3-8B", drafter="self", store=vectorstore)
        chain = {"context": retriever, "question": RunnablePassthrough()} | prompt | llm
        chain.invoke("Who signed the treaty?")
        ```

    Tool calling, with every model; a grammar keeps forced calls valid:
        ```python
        def population(city: str) -> int:
            \"\"\"Return the number of inhabitants.\"\"\"


        llm.bind_tools([population]).invoke("How many live in Oslo?").tool_calls
        ```

    Structured output:
        ```python
        class Person(BaseModel):
            name: str


        llm.with_structured_output(Person).invoke("Who wrote it?")
        ```
    """

    streaming: bool = False
    """Report tokens to callbacks from `invoke`, too; the answer is the same."""

    # --- answers ---

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        answer = MessageChunks(self._name, self._logprobs, self.output_version)
        return self._chunks(answer.push, messages, stop, kwargs, run_manager)

    def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        answer = MessageChunks(self._name, self._logprobs, self.output_version)
        return self._achunks(answer.push, messages, stop, kwargs, run_manager)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answer = MessageChunks(self._name, self._logprobs)
        return whole_answer([*self._chunks(answer.push, messages, stop, kwargs, to_end=True)])

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        answer = MessageChunks(self._name, self._logprobs)
        chunks = self._achunks(answer.push, messages, stop, kwargs, None)
        return whole_answer([chunk async for chunk in chunks])

    def _name(self) -> str:
        return self._rasd.model_name  # of a server that was named none: known once it answers

    def _read(self, value: LanguageModelInput) -> list[BaseMessage]:
        return self._convert_input(value).to_messages()

    # Where a callback listens to tokens, LangChain joins `_stream` itself, and mends broken calls.

    def generate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Return the answers to several conversations, as LangChain's base class does."""
        return _settled(super().generate(*args, **kwargs))

    async def agenerate(self, *args: Any, **kwargs: Any) -> LLMResult:
        """Return the answers to several conversations, as LangChain's base class does."""
        return _settled(await super().agenerate(*args, **kwargs))

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """Answer ``inputs`` at the same time, in their order; see ``batch_as_completed``."""
        ended = self.batch_as_completed(
            inputs, config, return_exceptions=return_exceptions, **kwargs
        )
        return [answer for _, answer in sorted(ended, key=itemgetter(0))]

    # --- tools and structured output ---

    def bind_tools(
        self,
        tools: Sequence[Tool],
        *,
        tool_choice: Mapping[str, Any] | str | bool | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with ``tools`` that it may, or must, call.

        Args:
            tools: Functions, classes, tools, or their schemas.
            tool_choice: None or "auto": the model is free. "any", "required" or True: it calls at least
                one. A tool's name, or OpenAI's dict of it: it calls that one. "none": it calls none.
            strict: Constrain arguments to their schemas also if no call is forced; of a call that
                must be made they always are.
            parallel_tool_calls: Allow several calls in one answer; None allows them unless a call is
                forced.
            **kwargs: Further options of each call.

        Raises:
            ConfigurationError: One of ``tools`` is nothing that LangChain can make a tool of.
        """
        choice = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls}
        given = {name: value for name, value in choice.items() if value is not None}
        return self.bind(tools=[openai_tool(t, strict=strict) for t in tools], **given, **kwargs)

    def with_structured_output(
        self,
        schema: dict[str, Any] | type | None = None,
        *,
        method: Method = "function_calling",
        include_raw: bool = False,
        strict: bool | None = None,
        tools: Sequence[Tool] | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return the model with answers of ``schema``.

        By every method a grammar constrains decoding, so an answer is valid unless ``max_tokens`` cut it.

        Args:
            schema: A pydantic class (answers are its instances), a TypedDict or a JSON schema (answers
                are dicts). None, with "json_mode" only, takes any object.
            method: "function_calling": the model reads the schema as a tool, which it must call.
                "json_schema": the text is the object; the prompt stays as it is. "json_mode": the text
                is any JSON object; say in the prompt which.
            include_raw: Return a dict of "raw" (the message), "parsed" and "parsing_error" instead.
            strict: As of ``bind_tools``; the grammar is always strict.
            tools: With "json_schema" and ``include_raw`` only: tools that the model may call instead of
                answering; "parsed" is then None.
            **kwargs: Refused.

        Raises:
            ConfigurationError: An unknown option, a combination that cannot be met, or nothing that LangChain
                can read a schema of.
        """
        return structured_output(
            self, schema, method=method, include_raw=include_raw, strict=strict, tools=tools, **kwargs
        )  # fmt: skip

    # --- what LangChain asks about the model ---

    @property
    def _llm_type(self) -> str:
        return "rasd-chat"

    def _resolve_model_profile(self) -> ModelProfile:
        constrained = find_spec("llguidance") is not None
        return ModelProfile(
            max_output_tokens=self.max_tokens or SAMPLING_DEFAULTS["max_tokens"],
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            tool_calling=True,
            tool_call_streaming=True,
            tool_choice=constrained,
            structured_output=constrained,
        )

    def load(self) -> Self:
        """Load the weights now rather than at the first call; the profile is then complete.

        Only then are the longest prompt and the use of reasoning known.
        """
        super().load()
        most = self.max_tokens or self._rasd.max_tokens
        found = {"max_output_tokens": most, "reasoning_output": self._rasd.has_reasoning}
        if (window := self._rasd.window) is not None:
            found["max_input_tokens"] = window - most
        assumed = self._resolve_model_profile()
        given = {n: v for n, v in (self.profile or {}).items() if assumed.get(n) != v}
        self.profile = cast("ModelProfile", {**assumed, **found, **given})
        return self

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return the length of ``messages`` as the model reads them, chat template and tools included."""
        options = {"tools": tools} if tools else {}
        return self._rasd.count_tokens(template_messages(messages), take_tool_use(options))


def _settled(result: LLMResult) -> LLMResult:
    for generations in result.generations:
        for generation in generations:
            if isinstance(generation, ChatGeneration):
                mark_invalid_calls(generation.message)
    return result
