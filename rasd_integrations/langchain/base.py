"""What the two LangChain models share: how a call reaches their engine, and how copies share it."""

from __future__ import annotations

import asyncio
import os
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel
from langchain_core.outputs import ChatGenerationChunk, GenerationChunk
from langchain_core.runnables.config import RunnableConfig, get_config_list
from pydantic import Field, PrivateAttr, field_validator, model_validator

from rasd_integrations._version import __version__
from rasd_integrations.edges.call_options import (
    ANSWER_OPTIONS,
    ENGINE_OPTIONS,
    FrameworkModel,
)
from rasd_integrations.edges.engine import NEVER_KEPT, Engine, logprob_entries, new_engine
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain.attach import find_source
from rasd_integrations.langchain.capture import CAPTURE
from rasd_integrations.langchain.errors import langchain_errors
from rasd_integrations.langchain.hints import prompt_hints
from rasd_integrations.langchain.messages import template_messages
from rasd_integrations.langchain.tools import answer_grammar, take_tool_use
from rasd_integrations.runtime.lazy_engine import LoadedName
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.runtime.together import MOST_AT_ONCE, as_they_end, until_left

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models import LangSmithParams, LanguageModelInput
    from langchain_core.messages import BaseMessage
    from typing_extensions import Self

    from rasd_integrations.config import SamplingParams
    from rasd_integrations.response_format import Grammar
    from rasd_integrations.text.answer.explanation import Explanation
    from rasd_integrations.types import TextDelta

_Chunk = TypeVar("_Chunk", GenerationChunk, ChatGenerationChunk)

_MOST_ENGINES = 8  # kept for copies; others live as long as a model that uses them
# LangChain's standard options of remote services: code that builds any chat model passes them, also without a server.
_REMOTE = frozenset({"api_key", "timeout", "max_retries"})
_warned: set[str] = set()


class _Alive:
    """Shared by a model's copies; the callback handler holds a weak reference to it."""


class Engines:
    """A model's engine and those of its copies, by their options.

    ``configurable_fields`` builds a model from the fields of another and drops it after the call. The copy's
    engine is kept here, with its weights, KV, drafters and statistics.
    """

    def __init__(self) -> None:
        """Hold none yet."""
        self._known: list[tuple[Mapping[str, Any], Engine]] = []  # least recently used first
        self._closed = False
        self._lock = threading.Lock()

    def get(self, options: Mapping[str, Any]) -> Engine:
        """Return the engine with ``options``, made if there is none; after :meth:`close` a closed one.

        Raises:
            ConfigurationError: The options contradict each other.
        """
        with self._lock:
            rasd = next((rasd for known, rasd in self._known if _same(known, options)), None)
            if rasd is None:
                rasd = new_engine(options)
                if self._closed:
                    rasd.close()
            self._put(options, rasd)
            return rasd

    def rename(self, rasd: Engine, options: Mapping[str, Any]) -> None:
        """Record an engine's new options."""
        with self._lock:
            self._put(options, rasd)

    def close(self) -> None:
        """Close all of them, and those made later."""
        with self._lock:
            self._closed = True
            for _, rasd in self._known:
                rasd.close()

    def _put(self, options: Mapping[str, Any], rasd: Engine) -> None:
        others = [known for known in self._known if known[1] is not rasd]
        self._known = [*others, (options, rasd)][-_MOST_ENGINES:]


def _same(known: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    try:
        return all(_equal(mine, options[name]) for name, mine in known.items())
    except Exception:  # noqa: BLE001 -- == of a user's store or option may raise anything
        return False


def _equal(mine: Any, theirs: Any) -> bool:
    """Compare two options; loaded objects by identity, not by their name."""
    if isinstance(mine, LoadedName) or isinstance(theirs, LoadedName):
        return mine is theirs
    return mine is theirs or bool(mine == theirs)


class RASDModel(FrameworkModel, BaseLanguageModel[Any], ABC):
    """The calls of both LangChain models on the engine behind them."""

    stop: list[str] | None = Field(
        default=None, description="Strings that end the answer; a call's own `stop` replaces them."
    )
    engines: Engines = Field(
        default_factory=Engines, frozen=True, exclude=True, repr=False,
        description="The engines shared with the copies that LangChain builds of a model's fields.",
    )  # fmt: skip

    _owns_engines: bool = PrivateAttr()
    _alive: _Alive = PrivateAttr(default_factory=_Alive)

    def __init__(self, model: str | Path = "", **options: Any) -> None:
        """Check the options. Load no weights and touch no network; the first call does, or ``load()``.

        Raises:
            ConfigurationError: An unknown option, a value out of its range, or a contradiction.
        """
        super().__init__(model, **_without_remote(options))
        self._owns_engines = "engines" not in options
        CAPTURE.watch_for(self._alive)

    @model_validator(mode="after")
    def _set_rasd_version(self) -> Self:
        self._add_version("rasd-integrations", __version__)
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    def _engine(self) -> Engine:
        return self.engines.get(self._engine_fields())

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave engines and secrets out of a pickle: a copy in another process has its own."""
        left = ("engines", *NEVER_KEPT)
        return partial(type(self), **{n: v for n, v in self if n not in left}), ()

    # --- beyond the framework's interface ---

    def attach(self, chain: object) -> Self:
        """Take the store inside ``chain``: a runnable, retriever, agent, tool or store.

        Raises:
            ConfigurationError: ``chain`` is a runnable without a vector store in it.
        """
        source = find_source(chain)
        self._rasd.attach(source)
        # The field is frozen, but a copy that LangChain builds of the fields must have the store as well.
        self.__dict__["store"] = source
        self.engines.rename(self._rasd, self._engine_fields())
        return self

    def _document_text(self, document: str | Document) -> str:
        return document.page_content if isinstance(document, Document) else document

    def close(self) -> None:
        """Free weights and caches, unless another model shares them; copies of this one are closed, too."""
        super().close()
        if self._owns_engines:
            self.engines.close()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy that shares the engine, or has its own if ``update`` asks for another."""
        if set(ENGINE_OPTIONS).isdisjoint(update or ()):
            return super().model_copy(update=update, deep=deep)
        own = {name: value for name, value in self if name != "engines"}
        return type(self)(**{**own, **(update or {})})

    def batch_as_completed(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | Sequence[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Iterator[tuple[int, Any]]:
        """Answer ``inputs`` concurrently and yield each one's number and answer as it ends.

        Unlike LangChain's own, an error, an interrupt or a consumer that leaves stops all within a step.
        """
        configs = get_config_list(config, len(inputs))

        def answer(number: int) -> Any:
            try:
                return self.invoke(inputs[number], configs[number], **kwargs)
            except Exception as err:
                if return_exceptions:
                    return err
                raise

        jobs = [partial(answer, number) for number in range(len(inputs))]
        if len(inputs) < 2:
            yield from ((number, job()) for number, job in enumerate(jobs))
            return
        limit = configs[0].get("max_concurrency") or min(MOST_AT_ONCE, (os.cpu_count() or 1) + 4)
        with closing(as_they_end(jobs, limit)) as ended:
            yield from ended

    # --- one call ---

    def explain(
        self, input: LanguageModelInput, *, stop: list[str] | None = None, **options: Any
    ) -> Explanation:
        """Answer as ``invoke`` does; return where drafts came from.

        Who drafted each token, what was accepted, and why nothing was drafted where nothing was.

        Args:
            input: What ``invoke`` takes: a text, messages, or a filled prompt.
            stop: Strings that end the answer.
            **options: Of this call, as for ``invoke``.
        """
        with langchain_errors():
            return self._rasd.explain(self._request(self._read(input), stop, options))

    @abstractmethod
    def _read(self, value: LanguageModelInput) -> Sequence[BaseMessage] | str:
        """Return an input of ``invoke`` as the model is given it."""

    def _request(
        self,
        prompt: Sequence[BaseMessage] | str,
        stop: Sequence[str] | None,
        options: dict[str, Any],
    ) -> Request:
        explicit = options.pop("rasd", None)
        tools = take_tool_use(options)
        params = self._sampling({**options, "stop": stop})
        hints = prompt_hints(prompt, CAPTURE.lookup(prompt), explicit)
        plain = prompt if isinstance(prompt, str) else template_messages(prompt)
        return Request(plain, params, hints, tools)

    def _chunks(
        self,
        push: Callable[[TextDelta], Iterator[_Chunk]],
        prompt: Sequence[BaseMessage] | str,
        stop: Sequence[str] | None,
        options: dict[str, Any],
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        to_end: bool = False,
    ) -> Iterator[_Chunk]:
        """Yield what ``push`` makes of the answer's deltas; closing stops decoding within a step.

        ``to_end``: the answer is read to its end at once, and waits until there is memory for it.
        """
        with langchain_errors():
            answer = self._rasd.stream_to_end if to_end else self._rasd.stream
            stream = answer(self._request(prompt, stop, options))
            with closing(until_left(stream)) as deltas:
                for chunk in (chunk for delta in deltas for chunk in push(delta)):
                    if run_manager:
                        run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk

    def _logprobs(self, delta: TextDelta) -> dict[str, Any] | None:
        """Return the log-probabilities of a delta's tokens as LangChain's ``generation_info``, if there are any."""
        if not delta.logprobs:
            return None
        return {"logprobs": {"content": logprob_entries(self._rasd, delta.logprobs)}}

    async def _achunks(
        self,
        push: Callable[[TextDelta], Iterator[_Chunk]],
        prompt: Sequence[BaseMessage] | str,
        stop: Sequence[str] | None,
        options: dict[str, Any],
        run_manager: AsyncCallbackManagerForLLMRun | None,
    ) -> AsyncIterator[_Chunk]:
        with langchain_errors():
            # In a thread: a long prompt is hashed and searched for what was captured.
            request = await asyncio.to_thread(self._request, prompt, stop, options)
            async with aclosing(self._rasd.astream(request)) as deltas:
                async for delta in deltas:
                    for chunk in push(delta):
                        if run_manager:
                            await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                        yield chunk

    def _sampling(self, changes: Mapping[str, Any]) -> SamplingParams:
        given = dict(changes)
        given.pop("stream", None)  # read by LangChain's base class
        if given.pop("n", None) not in (None, 1):
            msg = f"n is {changes['n']}, but one answer is drawn per call. Call batch() for more."
            raise ConfigurationError(msg)
        if given.pop("model", None) not in (None, self.model):
            msg = f"model= is {changes['model']!r}, but this one is {self.model!r}. Build another."
            raise ConfigurationError(msg)
        return super()._sampling(given)

    def _grammar(self, response_format: Any) -> Grammar | None:
        return answer_grammar(response_format)

    # --- what LangChain asks about the model ---

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        own = {name: value for name, value in self if name in ANSWER_OPTIONS}
        return {**self._rasd.identity, **own}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop or self.stop, **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of ``text`` in the model's own vocabulary."""
        custom = self.custom_get_token_ids
        return custom(text) if custom else self._rasd.encode(text)


def _without_remote(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options``, without a server also without its options; warn of each that is set, once a process."""
    if options.get("base_url") is not None:
        return dict(options)
    new = sorted(n for n in _REMOTE - _warned if options.get(n) is not None)
    _warned.update(new)
    if new:
        them = "it" if len(new) == 1 else "them"
        msg = (
            f"{', '.join(new)}: without effect, because the model runs in this process. Leave {them} out, or give "
            f"base_url for a model behind HTTP."
        )
        warnings.warn(msg, UserWarning, stacklevel=3)
    return {name: value for name, value in options.items() if name not in _REMOTE}
