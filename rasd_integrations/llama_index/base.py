"""``RASDLLM``, the LlamaIndex LLM: eight endpoints over the four calls of ``RASD``."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from llama_index.core.base.llms.generic_utils import (
    messages_to_prompt as generic_messages_to_prompt,
)
from llama_index.core.base.llms.generic_utils import prompt_to_messages
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.llm import default_completion_to_prompt
from llama_index.core.prompts import BasePromptTemplate
from pydantic import PrivateAttr

from rasd_integrations.edges.engine import logprob_entries
from rasd_integrations.errors import ConfigurationError, RetrievalError
from rasd_integrations.llama_index.capture import (
    Filled,
    PromptCapture,
    Sent,
    build_hints,
    chunk_of,
    same_prompt,
    sent_text,
)
from rasd_integrations.llama_index.errors import pipeline_errors
from rasd_integrations.llama_index.messages import to_messages
from rasd_integrations.llama_index.responses import (
    Respond,
    astream_responses,
    chat_response,
    completion_response,
    stream_responses,
    whole_response,
)
from rasd_integrations.llama_index.tool_calling import RASDCalling
from rasd_integrations.llama_index.tools import tool_specs
from rasd_integrations.llama_index.trace import IndexRetrieval, Trace, observe
from rasd_integrations.prompting import Prompt, PromptHints
from rasd_integrations.response_format import ToolUse
from rasd_integrations.runtime.hints import explicit_hints
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.text.answer.explanation import Explanation
from rasd_integrations.types import TokenLogprob, WrittenLogprob

logger = logging.getLogger(__name__)

_Response = TypeVar("_Response", ChatResponse, CompletionResponse)
_TOOL_OPTIONS = {
    "tools": "tools",
    "tool_choice": "tool_choice",
    "parallel_tool_calls": "parallel",
    "strict": "strict",
}


class RASDLLM(RASDCalling):
    """A local long-context model with speculative decoding.

    By default drafts come from the prompt's own text. ``drafter="self"``, a small model or a ``DatastoreDrafter`` also
    drafts from what the pipeline has retrieved, or from a collection; the index of the pipeline's retriever is found
    by itself. The answers are the model's own, unless ``knowledge_transfer`` or ``context="documents"`` is set.

    Calls take ``temperature``, ``top_p``, ``top_k``, ``max_tokens`` (or ``max_new_tokens``), ``stop``, ``seed``,
    ``logprobs``, ``top_logprobs``, ``on_cut``, ``knowledge_transfer`` and ``response_format`` (OpenAI's mapping, or a
    pydantic class); ``None`` means the field, but ``drafter=None`` decodes plainly and ``seed=None`` takes a fresh
    seed. Chat calls take ``tools``, ``tool_choice``, ``parallel_tool_calls`` and ``strict``, if the model has a chat
    template. ``rasd={"question": ..., "search_query": ..., "chunks": [...], "context": ..., "filter": ...}`` gives
    what the LLM cannot see of a retrieval. Any other option is refused.

    LlamaIndex counts tokens with another model's tokenizer; :func:`configure_settings` gives it this one's.

    Examples:
        Setup: ``pip install -e '.[llama-index]'`` in a clone::

            from rasd_integrations.llama_index import RASDLLM

            llm = RASDLLM("Qwen/Qwen3-8B", temperature=0, max_tokens=256)

        Or a model behind ``rasd serve``, vLLM or another server::

            llm = RASDLLM(base_url="http://localhost:8000/v1")

        Complete and chat::

            llm.complete("Who wrote it?").text
            llm.chat([ChatMessage(role="user", content="Who wrote it?")]).message.content

        Stream::

            for response in llm.stream_complete("Who wrote it?"):
                print(response.delta, end="")

        Query an index, with drafts from the retrieved nodes::

            llm = RASDLLM("Qwen/Qwen3-8B", drafter="self")
            index.as_query_engine(llm=llm, similarity_top_k=32).query("Who wrote it?")

        Call tools::

            FunctionAgent(tools=[population], llm=llm)

        Structured output, constrained to the class::

            llm.structured_predict(Person, PromptTemplate("Who wrote {book}?"), book="it")
    """

    _capture: PromptCapture = PrivateAttr(default_factory=PromptCapture)
    _trace: Trace = PrivateAttr()
    _found: weakref.ref[Any] | None = PrivateAttr(default=None)

    def model_post_init(self, context: Any, /) -> None:
        """Observe the pipelines of this process."""
        super().model_post_init(context)
        self._trace = observe(self._capture)

    @property
    def metadata(self) -> LLMMetadata:
        """The model's context window, and what its chat template allows.

        Loads no weights, but reads config and tokenizer once, or asks the server; await :meth:`aload` before to keep
        that off the event loop. The window of a server that names none is LlamaIndex's default, 3900. Functions can be
        called if the chat template writes the prompts.
        """
        return LLMMetadata(
            context_window=self._rasd.window or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens or self._rasd.max_tokens,
            is_chat_model=self._rasd.has_chat_template,
            is_function_calling_model=self._rasd.has_chat_template and not self._writes_prompts,
            model_name=self._rasd.model_name,
        )

    @property
    def _writes_prompts(self) -> bool:
        """True if the user's own function converts messages to text."""
        to_prompt = self.messages_to_prompt or generic_messages_to_prompt
        return to_prompt is not generic_messages_to_prompt

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return self._whole(chat_response, self._chat_request, messages, kwargs)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece; each response holds the answer so far and the new ``delta``."""
        return self._streamed(chat_response, self._chat_request, messages, kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation without blocking the event loop."""
        return await self._awhole(chat_response, self._chat_request, messages, kwargs)

    @llm_chat_callback()
    async def astream_chat(
        self, messages: Sequence[ChatMessage], **kwargs: Any
    ) -> ChatResponseAsyncGen:
        """Answer a conversation piece by piece without blocking the event loop."""
        return await self._astreamed(chat_response, self._chat_request, messages, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a text: as a user's message, or verbatim if ``formatted``."""
        return self._whole(completion_response, self._completion_request, prompt, formatted, kwargs)

    @llm_completion_callback()
    def stream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseGen:
        """Answer a text piece by piece; each response holds the answer so far and the new ``delta``."""
        return self._streamed(
            completion_response, self._completion_request, prompt, formatted, kwargs
        )

    @llm_completion_callback()
    async def acomplete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponse:
        """Answer a text without blocking the event loop."""
        return await self._awhole(
            completion_response, self._completion_request, prompt, formatted, kwargs
        )

    @llm_completion_callback()
    async def astream_complete(
        self, prompt: str, formatted: bool = False, **kwargs: Any
    ) -> CompletionResponseAsyncGen:
        """Answer a text piece by piece without blocking the event loop."""
        return await self._astreamed(
            completion_response, self._completion_request, prompt, formatted, kwargs
        )

    def explain(self, prompt: str | Sequence[ChatMessage], **options: Any) -> Explanation:
        """Answer as ``complete`` or ``chat`` does; return where drafts came from.

        Args:
            prompt: A text, for ``complete``, or messages, for ``chat``.
            **options: Of this call, as for these two.
        """
        explain = self._rasd.explain  # refused for a server, before that is asked for its template
        if isinstance(prompt, str):
            formatted = options.pop("formatted", False)
            return explain(self._completion_request(prompt, formatted, options))
        return explain(self._chat_request(prompt, options))

    def _whole(
        self, respond: Respond[_Response], make: Callable[..., Request], *given: Any
    ) -> _Response:
        with pipeline_errors(self._trace.in_pipeline()):
            return whole_response(respond, self._rasd.generate(make(*given)), self._entries)

    def _streamed(
        self, respond: Respond[_Response], make: Callable[..., Request], *given: Any
    ) -> Generator[_Response, None, None]:
        in_pipeline = self._trace.in_pipeline()
        with pipeline_errors(in_pipeline):
            deltas = self._rasd.stream(make(*given))
        return stream_responses(respond, deltas, in_pipeline, self._entries)

    # The asynchronous endpoints make requests in a thread: the first reads files, and templates may be long.

    async def _awhole(
        self, respond: Respond[_Response], make: Callable[..., Request], *given: Any
    ) -> _Response:
        with pipeline_errors(self._trace.in_pipeline()):
            request = await asyncio.to_thread(make, *given)
            return whole_response(respond, await self._rasd.agenerate(request), self._entries)

    async def _astreamed(
        self, respond: Respond[_Response], make: Callable[..., Request], *given: Any
    ) -> AsyncGenerator[_Response, None]:
        in_pipeline = self._trace.in_pipeline()
        with pipeline_errors(in_pipeline):
            request = await asyncio.to_thread(make, *given)
        deltas = self._rasd.astream(request)
        return astream_responses(respond, deltas, in_pipeline, self._entries)

    def _entries(self, logprobs: Sequence[TokenLogprob | WrittenLogprob]) -> list[dict[str, Any]]:
        return logprob_entries(self._rasd, logprobs)

    def _chat_request(self, messages: Sequence[ChatMessage], options: Mapping[str, Any]) -> Request:
        others = dict(options)
        given = {to: others.pop(name) for name, to in _TOOL_OPTIONS.items() if name in others}
        tools = ToolUse.of(tool_specs(given.pop("tools", None)), **given)
        return self._request(messages, self._chat_prompt, others, tools)

    def _completion_request(
        self, text: str, formatted: bool, options: Mapping[str, Any]
    ) -> Request:
        return self._request(text, partial(self._completion_prompt, formatted=formatted), options)

    def _request(
        self,
        sent: Any,
        to_prompt: Callable[[Any], Prompt],
        options: Mapping[str, Any],
        tools: ToolUse | None = None,
    ) -> Request:
        sampling = dict(options)
        explicit = explicit_hints(sampling.pop("rasd", None), chunk_of)
        params = self._sampling(sampling)
        prompt, hints = to_prompt(sent), self._hints(sent, to_prompt, explicit)
        if tools is not None and isinstance(prompt, str):
            why = (
                "messages_to_prompt writes its prompts"
                if self._writes_prompts
                else "it has no chat template"
            )
            msg = (
                f"{self._rasd.model_name} cannot be told of the tools {', '.join(tools.names)}: {why}. "
                f"Use a ReActAgent, or a model with a chat template."
            )
            raise ConfigurationError(msg)
        return Request(prompt, params, hints, tools)

    def _chat_prompt(self, messages: Sequence[ChatMessage]) -> Prompt:
        if self._writes_prompts or not self._rasd.has_chat_template:
            return (self.messages_to_prompt or generic_messages_to_prompt)(messages)
        return to_messages(messages)

    def _completion_prompt(self, text: str, *, formatted: bool) -> Prompt:
        if formatted:
            return text
        to_prompt = self.completion_to_prompt or default_completion_to_prompt
        if to_prompt is not default_completion_to_prompt or not self._rasd.has_chat_template:
            return self._extend_prompt(to_prompt(text))
        if self.query_wrapper_prompt is not None:
            text = self.query_wrapper_prompt.format(query_str=text)
        return to_messages(self._extend_messages(prompt_to_messages(text)))

    # --- how a prompt was made -------------------------------------------------------------------

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        messages = super()._get_messages(prompt, **prompt_args)
        self._capture.record(messages, Filled(prompt, prompt_args, "messages"))
        return messages

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        text = super()._get_prompt(prompt, **prompt_args)
        self._capture.record(text, Filled(prompt, prompt_args, "text"))
        return text

    def _fill(self, filled: Filled, args: Mapping[str, Any]) -> Sent:
        """Fill a template again as the framework did, with other arguments."""
        if filled.form == "messages":
            return super()._get_messages(filled.template, **args)
        if filled.form == "text":
            return super()._get_prompt(filled.template, **args)
        if self._rasd.has_chat_template:
            return self._extend_messages(filled.template.format_messages(llm=self, **args))
        return filled.template.format(llm=self, **args)

    def _hints(
        self, sent: Sent, to_prompt: Callable[[Any], Prompt], explicit: Mapping[str, Any]
    ) -> PromptHints | None:
        retrieval = self._trace.retrieval_for(sent_text(sent))
        filled = self._capture.lookup(sent) or self._structured(sent)
        self._discover(retrieval)
        return build_hints(
            sent, filled, retrieval, lambda f, args: to_prompt(self._fill(f, args)), explicit
        )

    def _structured(self, sent: Sent) -> Filled | None:
        """Return the template of the structured call around this one, if it makes this prompt.

        Structured programs fill their templates themselves; only an event at the start shows them.
        """
        for call in self._trace.structured_calls():
            filled = Filled(call.template, call.args, "structured")
            if same_prompt(self._fill(filled, call.args), sent):
                return filled
        return None

    def _discover(self, retrieval: IndexRetrieval | None) -> None:
        """Take the index of the pipeline's retriever as the store, unless the user gave one."""
        if self._store_given or retrieval is None or retrieval.index is None:
            return
        index = retrieval.index()
        if index is None or (self._found is not None and self._found() is index):
            return
        self._found = weakref.ref(index)
        try:
            self._rasd.attach(index)
        except RetrievalError as err:
            logger.warning("The pipeline's own index cannot be searched for chunks: %s", err)
