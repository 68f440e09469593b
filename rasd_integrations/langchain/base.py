"""What the two LangChain models share: their options, their engine, and how a call reaches it."""

from __future__ import annotations

import asyncio
from abc import ABC
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from langchain_core.documents import Document
from langchain_core.language_models import BaseLanguageModel
from pydantic import (
    Field,
    PrivateAttr,
    SkipValidation,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from rasd_integrations._version import __version__
from rasd_integrations.config import (
    ContextMode,
    ExecutorName,
    OnCut,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
    check_model_name,
    reject_unknown,
    updated,
)
from rasd_integrations.drafters.base import Drafter, drafter_name
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.langchain.attach import find_source
from rasd_integrations.langchain.capture import CAPTURE
from rasd_integrations.langchain.engines import Engines
from rasd_integrations.langchain.errors import langchain_errors
from rasd_integrations.langchain.hints import prompt_hints
from rasd_integrations.langchain.loaded import LoadedName
from rasd_integrations.langchain.messages import template_messages
from rasd_integrations.langchain.remote import without_remote
from rasd_integrations.langchain.together import AnswersTogether, until_left
from rasd_integrations.langchain.tools import answer_grammar, take_tool_use
from rasd_integrations.runtime.pipeline import Progress
from rasd_integrations.runtime.rasd import RASD

if TYPE_CHECKING:
    from types import TracebackType

    from langchain_core.language_models import LangSmithParams
    from langchain_core.messages import BaseMessage
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

    from rasd_integrations.prompting import PromptHints
    from rasd_integrations.response_format import ToolUse
    from rasd_integrations.stats import DecodingStats
    from rasd_integrations.types import Message, TextDelta

_ANSWER_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size", "max_tokens",
    "stop", "seed", "use_generation_config", "on_cut",
)  # fmt: skip
_KEPT_IF_NONE = ("seed", "drafter")  # for every other option None means the instance's own


class _Alive:
    """Lives as long as one of a model's copies: what the callback handler watches."""


class _Request(NamedTuple):
    """What the engine's methods take."""

    prompt: Sequence[Message] | str
    params: SamplingParams
    hints: PromptHints | None
    tools: ToolUse | None


class RASDModel(AnswersTogether, BaseLanguageModel[Any], ABC):
    """The options of both models, and the calls on the engine behind them.

    Options of an answer (``temperature`` to ``seed``) may be set anew on the instance or per call;
    options of the engine are set once.
    """

    model: str = Field(frozen=True)
    """Hub id, local folder, or path of a .gguf file. Loaded at the first call, or by `load()`."""
    drafter: SkipValidation[str | Path | Drafter | None] = Field(
        default="auto", frozen=True, repr=False
    )
    """"auto", None (plain decoding), "self", hub id or path of a small LM, or a Drafter object."""
    drafter_device: str | None = Field(default=None, frozen=True, repr=False)
    """Where a drafter model stands: "cpu", "cuda:1", ...; None: where the target would."""
    executor: ExecutorName = Field(default="auto", frozen=True, repr=False)
    """What runs the models' steps: "auto", "eager" (torch), "openvino", "openvino-kv8" or "cuda-graphs"."""
    store: SkipValidation[object] = Field(default=None, frozen=True, exclude=True, repr=False)
    """What `as_chunk_source()` takes: vector store, retriever, collection, texts, ... See also `attach()`."""
    temperature: float | None = None
    """0 is greedy. None, here and below: what the checkpoint's `generation_config` says, else greedy."""
    top_p: float | None = None
    """Nucleus in (0, 1]; 1 is off, the default."""
    top_k: int | None = None
    """Most likely tokens kept; 0 is off, the default."""
    min_p: float | None = None
    """Least probability, as a share of the most likely token's; 0 is off, the default."""
    repetition_penalty: float | None = None
    """Divides the scores of tokens in prompt and answer; 1 is off, the default."""
    no_repeat_ngram_size: int | None = None
    """No run of so many tokens occurs twice; 0 is off, the default."""
    max_tokens: int | None = None
    """Longest answer, in tokens; 512 by default."""
    stop: list[str] | None = None
    """Strings that end the answer; a call's own `stop` takes their place."""
    use_generation_config: bool = True
    """Whether the checkpoint's own options and masks count where none are set."""
    on_cut: OnCut = "close"
    """Of structured answers and forced calls that max_tokens ends: close them and warn, or "raise"."""
    seed: int | None = None
    """Seed of the draws; None takes a fresh one for each answer."""
    context: ContextMode = Field(default="prompt", frozen=True)
    """What the target reads: "prompt" as sent, or the whole "documents" its chunks came from."""
    knowledge_transfer: float = Field(default=0.0, frozen=True)
    """RAPID's eta; 0 is lossless."""
    deterministic: bool = Field(default=False, frozen=True)
    """The same call gives the same text, whatever was cached, drafted or asked beside it; at a price in time."""
    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, frozen=True, exclude=True, repr=False
    )
    """Straight to `from_pretrained`: dtype, device_map, revision, token, ... Never dumped."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, frozen=True, repr=False)
    """Straight to the chat template: enable_thinking, ..."""
    num_draft_tokens: int | None = Field(default=None, frozen=True)
    """Draft length; None lets the schedule choose it. Changes time only, never the answer."""
    retrieval: RetrievalConfig = Field(default=RetrievalConfig(), frozen=True, repr=False)
    """How chunks are found; a dict of its names is taken too."""
    speculation: SpeculationConfig = Field(default=SpeculationConfig(), frozen=True, repr=False)
    """How drafts are made and judged; a dict of its names is taken too."""
    prefix_cache_bytes: int | None = Field(default=None, frozen=True, repr=False)
    """Memory for the KV of prompts seen before; None takes the engine's default."""
    prefix_cache_dir: str | Path | None = Field(default=None, frozen=True, repr=False)
    """Folder for the KV of what `warm()` read, found again by later processes."""
    prefix_cache_dir_bytes: int | None = Field(default=None, frozen=True, repr=False)
    """Most that the folder may hold; None takes the engine's default."""
    namespace: str = Field(default="", frozen=True, repr=False)
    """Prompts of one namespace never reuse the KV of another's."""
    engines: Engines = Field(default_factory=Engines, frozen=True, exclude=True, repr=False)
    """What answers: shared with the copies that LangChain builds of a model's fields."""

    _rasd: RASD = PrivateAttr()
    _owns_engines: bool = PrivateAttr()
    _alive: _Alive = PrivateAttr(default_factory=_Alive)

    def __init__(self, **options: Any) -> None:
        """Check the options; load nothing.

        Raises:
            ConfigurationError: An unknown option, a value out of its range, or a contradiction.
        """
        options = without_remote(options)
        reject_unknown(options, type(self).model_fields, type(self).__name__)
        try:
            super().__init__(**options)
        except ValidationError as err:
            faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors()]
            raise ConfigurationError("; ".join(faults)) from err
        self._sampling(None, {})
        self._owns_engines = "engines" not in options
        self._rasd = self.engines.get(self._engine_options())
        CAPTURE.watch_for(self._alive)

    @model_validator(mode="after")
    def _set_rasd_version(self) -> Self:
        self._add_version("rasd-integrations", __version__)
        return self

    @field_validator("model", mode="plain")
    @classmethod
    def _name_of_model(cls, value: object) -> str:
        check_model_name(value, cls.__name__)
        return value if isinstance(value, LoadedName) else str(value)

    @field_serializer("drafter")
    def _drafter_name(self, drafter: str | Path | Drafter | None) -> str | None:
        return drafter_name(drafter)

    @field_validator("stop", mode="before")
    @classmethod
    def _list_of_stops(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("retrieval", "speculation", mode="before")
    @classmethod
    def _config_of_dict(cls, value: object, info: Any) -> object:
        if not isinstance(value, Mapping):
            return value
        kinds = {"retrieval": RetrievalConfig(), "speculation": SpeculationConfig()}
        return updated(kinds[info.field_name], value, info.field_name)

    def _engine_options(self) -> dict[str, Any]:
        """Return what decides the engine."""
        names = (name for name, field in type(self).model_fields.items() if field.frozen)
        return {name: getattr(self, name) for name in names if name != "engines"}

    # --- the public face beyond the framework's ---

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter_model: PreTrainedModel | None = None,
        **options: Any,
    ) -> Self:
        """Return a model over objects that are loaded already; ``options`` as in the constructor."""
        return cls(model=LoadedName(model, tokenizer, drafter_model), **options)

    def attach(self, chain: object) -> Self:
        """Draft from the store inside ``chain``: a runnable, retriever, agent, tool or store.

        Raises:
            ConfigurationError: ``chain`` is a runnable without a vector store in it.
        """
        source = find_source(chain)
        self._rasd.attach(source)
        # Past the freeze: a copy that LangChain builds of the fields must have the store as well.
        self.__dict__["store"] = source
        self.engines.rename(self._rasd, self._engine_options())
        return self

    def load(self) -> Self:
        """Load the weights now rather than at the first call."""
        self._rasd.ensure_loaded()
        return self

    def warm(self, documents: Sequence[str | Document], progress: Progress | None = None) -> None:
        """Read a document set ahead of the questions on it, and keep its KV; in `prefix_cache_dir` for good.

        `progress` is called with tokens done and tokens in all.
        """
        texts = [d.page_content if isinstance(d, Document) else d for d in documents]
        self._rasd.warm(texts, progress)

    def clear_cache(self) -> None:
        """Forget the keys and values kept of earlier prompts, in memory, of all who share these weights."""
        self._rasd.clear_cache()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, for text splitters; loads no weights."""
        return self._rasd.tokenizer

    @property
    def stats(self) -> DecodingStats:
        """Statistics of all answers; each answer also carries its own."""
        return self._rasd.stats

    def close(self) -> None:
        """Give the weights and caches back, unless another model shares them; copies of this one are closed, too."""
        self._rasd.close()
        if self._owns_engines:
            self.engines.close()

    def __enter__(self) -> Self:
        """Return the model; leaving the block closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the model."""
        self.close()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy that shares the engine, or has its own where ``update`` asks for another."""
        fields = type(self).model_fields
        if any(fields[name].frozen for name in update or () if name in fields):
            own = {name: getattr(self, name) for name in fields if name != "engines"}
            return type(self)(**{**own, **(update or {})})
        return super().model_copy(update=update, deep=deep)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a copy that shares the engine: weights are never copied along with options."""
        return self.__copy__()

    # --- one call ---

    def _request(
        self,
        prompt: Sequence[BaseMessage] | str,
        stop: Sequence[str] | None,
        options: dict[str, Any],
    ) -> _Request:
        explicit = options.pop("rasd", None)
        tools = take_tool_use(options)
        params = self._sampling(stop, options)
        plain = prompt if isinstance(prompt, str) else template_messages(prompt)
        hints = prompt_hints(prompt, CAPTURE.lookup(prompt), explicit)
        return _Request(plain, params, hints, tools)

    @contextmanager
    def _pieces(
        self,
        prompt: Sequence[BaseMessage] | str,
        stop: Sequence[str] | None,
        options: dict[str, Any],
    ) -> Iterator[Iterator[TextDelta]]:
        """Give the answer's pieces, closed when their consumer goes: decoding stops within a step."""
        with langchain_errors():
            plain, params, hints, tools = self._request(prompt, stop, options)
            stream = self._rasd.stream(plain, params, hints=hints, tools=tools)
            with closing(until_left(stream)) as pieces:
                yield pieces

    @asynccontextmanager
    async def _apieces(
        self,
        prompt: Sequence[BaseMessage] | str,
        stop: Sequence[str] | None,
        options: dict[str, Any],
    ) -> AsyncIterator[AsyncIterator[TextDelta]]:
        with langchain_errors():
            # In a thread: a long prompt is hashed and searched for what was captured.
            request = await asyncio.to_thread(self._request, prompt, stop, options)
            plain, params, hints, tools = request
            stream = self._rasd.astream(plain, params, hints=hints, tools=tools)
            async with aclosing(stream) as pieces:
                yield pieces

    def _sampling(self, stop: Sequence[str] | None, options: dict[str, Any]) -> SamplingParams:
        """Return the instance's options with those of a call in their place."""
        asked = {**options, "stop": stop}
        given = {n: v for n, v in asked.items() if v is not None or n in _KEPT_IF_NONE}
        given.pop("stream", None)  # read by LangChain's base class
        if given.pop("n", 1) != 1:
            msg = f"n is {options['n']}, but one answer is drawn per call. Call batch() for more."
            raise ConfigurationError(msg)
        if given.pop("model", self.model) != self.model:
            msg = f"model= is {options['model']!r}, but this one is {self.model!r}. Build another."
            raise ConfigurationError(msg)
        if "drafter" in given:
            given["drafting"] = self._drafting(given.pop("drafter"))
        if "response_format" in given:
            given["grammar"] = answer_grammar(given.pop("response_format"))
        own = {name: getattr(self, name) for name in _ANSWER_OPTIONS}
        try:
            mine = SamplingParams(**own)
            return updated(mine, given, f"a call of {type(self).__name__}")
        except TypeError as err:
            msg = f"An option has a value of the wrong type: { ({**own, **given}) }. {err}."
            raise ConfigurationError(msg) from err

    def _drafting(self, asked: Any) -> bool:
        """Return whether a call that asks for this drafter drafts; a call may only turn drafting off."""
        if asked is None:
            return False
        if asked is self.drafter or asked == self.drafter or (asked == "auto" and self.drafter):
            return True
        msg = (
            f"drafter is {asked!r} for this call, but the model was built with {self.drafter!r}. Pass None "
            f"to decode plainly, or build another model for another drafter."
        )
        raise ConfigurationError(msg)

    # --- what LangChain asks about the model ---

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        own = {name: getattr(self, name) for name in _ANSWER_OPTIONS}
        return {**self._rasd.identity, **own}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=stop or self.stop, **kwargs)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of ``text`` in the model's own vocabulary."""
        custom = self.custom_get_token_ids
        return custom(text) if custom else self._rasd.encode(text)
