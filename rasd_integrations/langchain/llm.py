"""The plain-text model: prompts go to the model as given, without a chat template."""

from __future__ import annotations

import asyncio
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseLLM
from langchain_core.outputs import GenerationChunk, LLMResult

from rasd_integrations.langchain.base import RASDModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from langchain_core.callbacks import (
        AsyncCallbackManagerForLLMRun,
        CallbackManagerForLLMRun,
    )

    from rasd_integrations.types import TextChunk


class RASDLLM(RASDModel, BaseLLM):
    """A local completion model that drafts from what the chain has retrieved.

    Example:
        ```python
        llm = RASDLLM(model="Qwen/Qwen3-8B-Base", store=vectorstore, max_tokens=64)
        for text in (prompt | llm).stream({"context": context, "question": question}):
            ...
        ```
    """

    # --- answers ---

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with self._pieces(self._request(prompt, stop, kwargs)) as pieces:
            for piece in pieces:
                if chunk := self._chunk(piece):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        # In a thread: a long prompt is hashed and searched for what was captured.
        request = await asyncio.to_thread(self._request, prompt, stop, kwargs)
        async with self._apieces(request) as pieces:
            async for piece in pieces:
                if chunk := self._chunk(piece):
                    if run_manager:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result([_joined(list(self._stream(p, stop, **kwargs))) for p in prompts])

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        answers = []
        for prompt in prompts:
            chunks = [chunk async for chunk in self._astream(prompt, stop, **kwargs)]
            answers.append(_joined(chunks))
        return self._result(answers)

    def _chunk(self, piece: TextChunk) -> GenerationChunk | None:
        """Return ``piece`` as LangChain's chunk; ``None`` while text is held back."""
        if piece.finish_reason is None or piece.stats is None:
            return GenerationChunk(text=piece.text) if piece.text else None
        stats = piece.stats
        info = {
            "model_name": self._rasd.model_name,
            "finish_reason": piece.finish_reason,
            "token_usage": {
                "prompt_tokens": stats.prompt_tokens,
                "completion_tokens": stats.generated_tokens,
                "total_tokens": stats.prompt_tokens + stats.generated_tokens,
            },
            "rasd": stats.as_dict(),
        }
        return GenerationChunk(text=piece.text, generation_info=info)

    def _result(self, answers: Sequence[GenerationChunk]) -> LLMResult:
        usages = [(answer.generation_info or {})["token_usage"] for answer in answers]
        usage = {name: sum(u[name] for u in usages) for name in (usages[0] if usages else ())}
        return LLMResult(
            generations=[[answer] for answer in answers],
            llm_output={"token_usage": usage, "model_name": self._rasd.model_name},
        )

    @property
    def _llm_type(self) -> str:
        return "rasd"


def _joined(chunks: list[GenerationChunk]) -> GenerationChunk:
    return reduce(add, chunks)
