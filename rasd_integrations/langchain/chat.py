"""The chat model: LangChain's messages in, its message chunks out. One path, `_stream`; the rest joins it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from langchain_core.language_models import BaseChatModel, ModelProfile
from langchain_core.language_models.chat_models import agenerate_from_stream, generate_from_stream
from langchain_core.messages import AIMessageChunk
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain.base import RASDModel
from rasd_integrations.langchain.messages import template_messages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from langchain_core.callbacks import (
        AsyncCallbackManagerForLLMRun,
        CallbackManagerForLLMRun,
    )
    from langchain_core.messages import BaseMessage
    from typing_extensions import Self

    from rasd_integrations.types import TextChunk


class ChatRASD(RASDModel, BaseChatModel):
    """A local chat model that drafts from what the chain has retrieved.

    Example:
        ```python
        llm = ChatRASD(model="Qwen/Qwen3-8B", store=vectorstore)
        chain = {"context": retriever, "question": RunnablePassthrough()} | prompt | llm
        answer = chain.invoke("Who signed the treaty?")
        answer.response_metadata["rasd"]["mean_acceptance_length"]
        ```
    """

    streaming: bool = False
    """Whether `invoke` reports tokens to callbacks as well; the answer is the same."""

    # --- answers ---

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with self._pieces(self._request(messages, stop, kwargs)) as pieces:
            for piece in pieces:
                if chunk := self._chunk(piece):
                    if run_manager:
                        run_manager.on_llm_new_token(piece.text, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        # In a thread: a long prompt is hashed and searched for what was captured.
        request = await asyncio.to_thread(self._request, messages, stop, kwargs)
        async with self._apieces(request) as pieces:
            async for piece in pieces:
                if chunk := self._chunk(piece):
                    if run_manager:
                        await run_manager.on_llm_new_token(piece.text, chunk=chunk)
                    yield chunk

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, **kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return await agenerate_from_stream(self._astream(messages, stop, **kwargs))

    def _chunk(self, piece: TextChunk) -> ChatGenerationChunk | None:
        """Return ``piece`` as LangChain's chunk; ``None`` while text is held back."""
        if piece.finish_reason is None or piece.stats is None:
            message = AIMessageChunk(content=piece.text) if piece.text else None
            return ChatGenerationChunk(message=message) if message else None
        # All of it on the last chunk only: LangChain adds numbers and joins strings over chunks.
        stats = piece.stats
        usage = UsageMetadata(
            input_tokens=stats.prompt_tokens,
            output_tokens=stats.generated_tokens,
            total_tokens=stats.prompt_tokens + stats.generated_tokens,
            input_token_details=InputTokenDetails(cache_read=stats.cached_prompt_tokens),
        )
        metadata = {
            "model_name": self._rasd.model_name,
            "model_provider": "rasd",
            "finish_reason": piece.finish_reason,
            "rasd": stats.as_dict(),
        }
        message = AIMessageChunk(
            content=piece.text,
            chunk_position="last",
            usage_metadata=usage,
            response_metadata=metadata,
        )
        return ChatGenerationChunk(message=message)

    # --- what LangChain asks about the model ---

    @property
    def _llm_type(self) -> str:
        return "rasd-chat"

    def _resolve_model_profile(self) -> ModelProfile:
        return ModelProfile(
            max_output_tokens=self.max_tokens,
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            reasoning_output=False,
            tool_calling=False,
            structured_output=False,
        )

    def load(self) -> Self:
        """Load the weights now rather than at the first call; the profile then knows the window."""
        super().load()
        room = self._rasd.window - self.max_tokens
        self.profile = cast("ModelProfile", {"max_input_tokens": room, **(self.profile or {})})
        return self

    def get_num_tokens_from_messages(
        self, messages: list[BaseMessage], tools: Sequence[Any] | None = None
    ) -> int:
        """Return the length of ``messages`` as the model reads them, chat template included.

        Raises:
            ConfigurationError: ``tools`` are given.
        """
        if tools:
            msg = "tools= cannot be counted: ChatRASD does not support tools yet."
            raise ConfigurationError(msg)
        return self._rasd.count_tokens(template_messages(messages))
