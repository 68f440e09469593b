"""The LangChain completion model."""

from __future__ import annotations

import asyncio
from contextlib import closing
from functools import partial, reduce
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseLLM
from langchain_core.outputs import GenerationChunk, LLMResult

from rasd_integrations.langchain.base import RASDModel
from rasd_integrations.runtime.together import MOST_AT_ONCE, as_they_end

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from langchain_core.callbacks import (
        AsyncCallbackManagerForLLMRun,
        CallbackManagerForLLMRun,
    )
    from langchain_core.language_models import LanguageModelInput

    from rasd_integrations.types import TextDelta


class RASDLLM(RASDModel, BaseLLM):
    """A local completion model with speculative decoding; prompts are read as given, without a chat template.

    Options, drafts and stores are those of `ChatRASD`. The prompts of a batch are answered concurrently.

    Setup:
        ```bash
        pip install -e '.[langchain]'  # in a clone
        ```

    Instantiate:
        ```python
        from rasd_integrations.langchain import RASDLLM

        llm = RASDLLM(model="Qwen/Qwen3-8B-Base", temperature=0, max_tokens=64)
        ```

    Invoke:
        ```python
        llm.invoke("The lighthouse was built by")
        llm.batch(["The lighthouse was built by", "It was lit in"])
        ```

    Stream:
        ```python
        for text in llm.stream("The lighthouse was built by"):
            print(text, end="")
        ```

    Async:
        ```python
        await llm.ainvoke("The lighthouse was built by")
        ```

    In a chain:
        ```python
        (prompt | llm).invoke({"context": context, "question": question})
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
        return self._chunks(self._push, prompt, stop, kwargs, run_manager)

    def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        return self._achunks(self._push, prompt, stop, kwargs, run_manager)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        def answer(prompt: str) -> GenerationChunk:
            return reduce(add, self._chunks(self._push, prompt, stop, {**kwargs}, to_end=True))

        with closing(as_they_end([partial(answer, p) for p in prompts], MOST_AT_ONCE)) as ended:
            return self._result([chunk for _, chunk in sorted(ended, key=itemgetter(0))])

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        gate = asyncio.Semaphore(MOST_AT_ONCE)

        async def answer(prompt: str) -> GenerationChunk:
            async with gate:
                return reduce(add, [chunk async for chunk in self._astream(prompt, stop, **kwargs)])

        tasks = [asyncio.create_task(answer(prompt)) for prompt in prompts]
        try:
            answers = await asyncio.gather(*tasks)
        finally:  # an error in one ends all
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return self._result(answers)

    def _read(self, value: LanguageModelInput) -> str:
        return self._convert_input(value).to_string()

    def _push(self, delta: TextDelta) -> Iterator[GenerationChunk]:
        """Yield ``delta`` as LangChain's chunk; while text is held back nothing, but for log-probabilities."""
        own = self._logprobs(delta)
        if delta.finish_reason is None or delta.stats is None:
            if delta.text or own:
                yield GenerationChunk(text=delta.text, generation_info=own)
            return
        stats = delta.stats
        info = {
            "model_name": self._rasd.model_name,
            "finish_reason": delta.finish_reason,
            "token_usage": {
                "prompt_tokens": stats.prompt_tokens,
                "completion_tokens": stats.generated_tokens,
                "total_tokens": stats.prompt_tokens + stats.generated_tokens,
            },
            "rasd": stats.as_dict(),
            **(own or {}),
        }
        yield GenerationChunk(text=delta.text, generation_info=info)

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
