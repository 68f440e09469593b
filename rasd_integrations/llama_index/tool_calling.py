"""Tool calling and structured prediction for LlamaIndex's agents and programs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.instrumentation import get_dispatcher  # type: ignore[attr-defined]
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.program.utils import FlexibleModel, create_flexible_model
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import Model, PydanticProgramMode
from pydantic import ValidationError

from rasd_integrations.llama_index.options import RASDOptions
from rasd_integrations.llama_index.tools import calls_in, keep_first_call, selection, tool_specs

dispatcher = get_dispatcher(__name__)

_Objects = Any  # what the framework calls Model | list[Model] | FlexibleModel | list[FlexibleModel]


class RASDCalling(RASDOptions):
    """What agents and structured programs call, over the chat endpoints that :class:`RASDLLM` adds."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: Sequence[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of a chat call; the caller's history is copied, never added to.

        ``tool_choice`` is ``"auto"``, ``"required"``, ``"none"`` or a tool's name, and overrides ``tool_required``.
        Forced calls are constrained to their schema; ``verbose`` prints nothing.
        """
        messages = list(chat_history or ())
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        if user_msg is not None:
            messages.append(user_msg)
        by_default = "required" if tool_required else "auto"
        return {
            "messages": messages,
            "tools": tool_specs(tools),
            "tool_choice": by_default if tool_choice is None else tool_choice,
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,
    ) -> ChatResponse:
        if not allow_parallel_tool_calls:
            keep_first_call(response.message)
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls in a response, whole or streamed so far.

        Raises:
            ValueError: There is none and ``error_on_no_tool_call`` is set.
            DecodingError: The answer ended at ``max_tokens`` within a call.
        """
        calls = calls_in(response.message)
        if error_on_no_tool_call and not calls:
            msg = (
                f"The answer calls no tool, it says {response.message.content!r}. Ask with tool_required=True "
                f"to have one called."
            )
            raise ValueError(msg)
        raw = response.raw
        cut = isinstance(raw, Mapping) and raw.get("finish_reason") == "length"
        return [selection(call, cut=cut) for call in calls]

    # --- structured prediction -------------------------------------------------------------------

    def structured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Format the template and return an object; decoding is constrained to its schema.

        A model with a chat template is forced to call a tool of that schema; another one, or any in
        ``PydanticProgramMode.LLM``, reads the schema in its prompt and writes JSON.

        Args:
            output_cls: The pydantic class.
            prompt: The template.
            llm_kwargs: Options of the call.
            **prompt_args: The template's variables.

        Raises:
            DecodingError: The answer reached ``max_tokens`` before the object was whole.
        """
        options = self._structured_options(output_cls, llm_kwargs)
        result: Model = super().structured_predict(output_cls, prompt, options, **prompt_args)
        return result

    @dispatcher.span
    async def astructured_predict(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Model:
        """Answer with an object as :meth:`structured_predict` does, without blocking the event loop."""
        options = self._structured_options(output_cls, llm_kwargs)
        result: Model
        if not self._predicts_by_call:
            result = await super().astructured_predict(output_cls, prompt, options, **prompt_args)
            return result
        # The framework's program would leave the system prompt out.
        start = LLMStructuredPredictStartEvent(
            output_cls=output_cls, template=prompt, template_args=prompt_args
        )
        dispatcher.event(start)
        response = await self.achat_with_tools(
            **{**options, **self._object_call(output_cls, prompt, prompt_args)}
        )
        (call,) = self.get_tool_calls_from_response(response)
        result = output_cls.model_validate(call.tool_kwargs)
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    def _structured_stream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[_Objects, None, None]:
        # The framework's program neither forces the call nor reads blocks when it streams.
        options = self._structured_options(output_cls, llm_kwargs)
        if not self._predicts_by_call:
            return super()._structured_stream_call(output_cls, prompt, options, **prompt_args)
        read = self._object_reader(output_cls)
        responses = self.stream_chat_with_tools(
            **{**options, **self._object_call(output_cls, prompt, prompt_args)}
        )
        return (found for response in responses if (found := read(response)) is not None)

    async def _structured_astream_call(
        self,
        output_cls: type[Model],
        prompt: PromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[_Objects, None]:
        options = self._structured_options(output_cls, llm_kwargs)
        if not self._predicts_by_call:
            return await super()._structured_astream_call(
                output_cls, prompt, options, **prompt_args
            )
        read = self._object_reader(output_cls)
        responses = await self.astream_chat_with_tools(
            **{**options, **self._object_call(output_cls, prompt, prompt_args)}
        )
        return (found async for response in responses if (found := read(response)) is not None)

    @property
    def _predicts_by_call(self) -> bool:
        mode = self.pydantic_program_mode
        return mode is PydanticProgramMode.FUNCTION or (
            mode is PydanticProgramMode.DEFAULT and self.metadata.is_function_calling_model
        )

    def _structured_options(
        self, output_cls: type[Model], given: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Return a copy of a call's options; programs that read JSON from text get its grammar."""
        options = dict(given or {})
        mode = self.pydantic_program_mode
        if mode is PydanticProgramMode.LLM or (
            mode is PydanticProgramMode.DEFAULT and not self._predicts_by_call
        ):
            options.setdefault("response_format", output_cls)
        return options

    def _object_call(
        self, output_cls: type[Model], prompt: PromptTemplate, args: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the options that force a call of the class's tool; they override the caller's."""
        return {
            "tools": [get_function_tool(output_cls)],
            "chat_history": self._extend_messages(prompt.format_messages(llm=self, **args)),
            "tool_choice": "required",
            "allow_parallel_tool_calls": False,
        }

    def _object_reader(
        self, output_cls: type[Model]
    ) -> Callable[[ChatResponse], Model | FlexibleModel | None]:
        return partial(self._object_in, output_cls, create_flexible_model(output_cls))

    def _object_in(
        self, output_cls: type[Model], partial_cls: type[FlexibleModel], response: ChatResponse
    ) -> Model | FlexibleModel | None:
        """Return the object as far as it is written, ``None`` before it begins; the last one is valid."""
        done = response.raw is not None
        calls = self.get_tool_calls_from_response(response, error_on_no_tool_call=done)
        if not calls:
            return None
        try:
            return output_cls.model_validate(calls[0].tool_kwargs)
        except ValidationError:
            if done:
                raise
            return partial_cls.model_validate(calls[0].tool_kwargs)
