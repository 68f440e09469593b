"""The options and the life cycle of the LlamaIndex LLM: pydantic fields in, one ``RASD`` behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.generic_utils import messages_to_prompt
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.schema import BaseNode, MetadataMode
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    PydanticUserError,
    SkipValidation,
    ValidationError,
    field_serializer,
)
from typing_extensions import Self

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
from rasd_integrations.llama_index.messages import to_messages
from rasd_integrations.response_format import Grammar
from rasd_integrations.runtime.pipeline import Progress
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.grammar.schema import without_unique_items

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ALIAS = "max_new_tokens"
_SAMPLING_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size", "max_tokens",
    "stop", "seed", "use_generation_config", "on_cut",
)  # fmt: skip
_ENGINE_OPTIONS = (
    "drafter",
    "drafter_device",
    "executor",
    "store",
    "context",
    "knowledge_transfer",
    "deterministic",
    "model_kwargs",
    "chat_template_kwargs",
    "retrieval",
    "namespace",
)


class RASDOptions(FunctionCallingLLM):
    """What :class:`RASDLLM` is made of; it adds the endpoints.

    Options of the engine are frozen: a change after construction would have no effect. Options of sampling may
    be set at any time and count from the next call on.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model: str = Field(frozen=True)
    """Hub id, local folder, or path of a ``.gguf`` file."""
    drafter: SkipValidation[str | Path | Drafter | None] = Field(default="auto", frozen=True)
    """``"auto"``, ``None`` (plain decoding), ``"self"``, hub id or path of a small LM, or a ``Drafter``."""
    drafter_device: str | None = Field(default=None, frozen=True)
    """Where a drafter model stands: ``"cpu"``, ``"cuda:1"``, ...; ``None``: where the target would."""
    executor: ExecutorName = Field(default="auto", frozen=True)
    """What runs steps: ``"auto"``, ``"eager"`` (torch), ``"openvino"``, ``"openvino-kv8"`` or ``"cuda-graphs"``."""
    store: SkipValidation[object] = Field(default=None, frozen=True, exclude=True, repr=False)
    """Where chunks are searched; ``None`` takes the index that the pipeline's own retriever reads."""
    temperature: float | None = None
    """0 is greedy. ``None``, here and below: what the checkpoint's ``generation_config`` says, else greedy."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    """Least probability, as a share of the most likely token's; 0 is off, the default."""
    repetition_penalty: float | None = None
    """Divides the scores of tokens in prompt and answer; 1 is off, the default."""
    no_repeat_ngram_size: int | None = None
    """No run of so many tokens occurs twice; 0 is off, the default."""
    max_tokens: int | None = None
    """Longest answer in tokens, 512 by default; also ``max_new_tokens``."""
    stop: str | list[str] | None = None
    """Strings that end the answer; they are not part of it."""
    seed: int | None = None
    use_generation_config: bool = True
    """Whether the checkpoint's own options and masks count where none are set."""
    on_cut: OnCut = "close"
    """Of structured answers and forced calls that max_tokens ends: close them and warn, or "raise"."""
    context: ContextMode = Field(default="prompt", frozen=True)
    """What the target reads: ``"prompt"`` as sent, or the ``"documents"`` that its chunks came from."""
    knowledge_transfer: float = Field(default=0.0, frozen=True)
    """RAPID's eta; 0 is lossless."""
    deterministic: bool = Field(default=False, frozen=True)
    """The same call gives the same text, whatever was cached, drafted or asked beside it; at a price in time."""
    model_kwargs: dict[str, Any] = Field(default={}, frozen=True, exclude=True, repr=False)
    """Straight to ``from_pretrained``; may hold secrets, so it is never written down."""
    chat_template_kwargs: dict[str, Any] = Field(default={}, frozen=True)
    num_draft_tokens: int | None = Field(default=None, frozen=True)
    """Draft length; ``None`` lets the schedule choose it. Changes time only, never the answer."""
    retrieval: RetrievalConfig = Field(default=RetrievalConfig(), frozen=True)
    speculation: SpeculationConfig = Field(default=SpeculationConfig(), frozen=True)
    prefix_cache_bytes: int | None = Field(default=None, frozen=True)
    """Memory that kept prompts may take; ``None`` leaves it to the engine."""
    prefix_cache_dir: str | Path | None = Field(default=None, frozen=True)
    """Folder for what ``warm()`` computed, found again by later processes."""
    prefix_cache_dir_bytes: int | None = Field(default=None, frozen=True)
    """Most that the folder may hold; ``None`` leaves it to the engine."""
    namespace: str = Field(default="", frozen=True)
    """Kept prompts are shared only within a namespace."""

    _rasd: RASD = PrivateAttr()
    _store_given: bool = PrivateAttr(default=False)

    def __init__(
        self, model: str | Path = "", *, _loaded: Sequence[Any] | None = None, **options: Any
    ) -> None:
        """Check the options. Loads no weights and touches no network; the first call does, or ``load()``.

        Raises:
            ConfigurationError: An unknown option, a value out of its range, a contradiction.
        """
        options = _one_name(options)
        reject_unknown(options, type(self).model_fields, type(self).__name__)
        check_model_name(model, type(self).__name__)
        try:
            super().__init__(**{**options, "model": str(model)})
        except ValidationError as err:
            raise ConfigurationError(_first(err)) from err
        self._sampling({})
        self._rasd = self._make_engine(_loaded)
        self._store_given = self.store is not None

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter_model: PreTrainedModel | None = None,
        **options: Any,
    ) -> Self:
        """Return an LLM round objects that are already loaded; ``options`` as in the constructor.

        Raises:
            ConfigurationError: As in the constructor.
        """
        reject_unknown(_one_name(options), cls.model_fields, cls.__name__)
        name = getattr(model, "name_or_path", "") or type(model).__name__
        return cls(name, _loaded=(model, tokenizer, drafter_model), **options)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that serialised objects carry."""
        return "RASDLLM"

    @field_serializer("drafter")
    def _drafter_name(self, drafter: str | Path | Drafter | None) -> str | None:
        return drafter_name(drafter)

    @property
    def max_new_tokens(self) -> int | None:
        """``max_tokens``, by its other name."""
        return self.max_tokens

    @property
    def stats(self) -> DecodingStats:
        """The counters of all answers so far; each answer carries its own in ``raw["rasd"]``."""
        return self._rasd.stats

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer; loads no weights. Splitters and memories take :meth:`encode`."""
        return self._rasd.tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens."""
        return self._rasd.encode(text)

    def count_tokens(self, messages: Sequence[ChatMessage]) -> int:
        """Return the tokens of ``messages`` as the model reads them, chat template included."""
        if self._rasd.has_chat_template:
            return self._rasd.count_tokens(to_messages(messages))
        return self._rasd.count_tokens(messages_to_prompt(messages))

    def template_tokens(self) -> int:
        """Return the tokens that are put round a system and a user message, or round a plain text."""
        letter = "a"
        size = len(self.encode(letter))
        if not self._rasd.has_chat_template:
            return self._rasd.count_tokens(letter) - size
        messages = [{"role": role, "content": letter} for role in ("system", "user")]
        return self._rasd.count_tokens(messages) - 2 * size

    def load(self) -> Self:
        """Load the weights now; returns itself."""
        self._rasd.ensure_loaded()
        return self

    async def aload(self) -> Self:
        """Load the weights in a thread; returns itself.

        Await it when a server starts: later calls then find config and tokenizer read, also where the
        framework asks for ``metadata`` on the event loop.
        """
        await asyncio.to_thread(self._rasd.ensure_loaded)
        return self

    def attach(self, pipeline: Any) -> Self:
        """Search chunks in the store inside ``pipeline``; returns itself.

        Args:
            pipeline: An index, retriever, query engine, chat engine or retriever tool, or any store.

        Raises:
            RetrievalError: There is no store in it that can be searched.
        """
        self._rasd.attach(_retriever_in(pipeline))
        self._store_given = True
        return self

    def warm(self, documents: Sequence[str | BaseNode], progress: Progress | None = None) -> Self:
        """Read a set of documents ahead of the questions, and keep what that computed; returns itself.

        In ``prefix_cache_dir`` it is kept for good. ``progress`` is called with tokens done and tokens in all.
        """
        self._rasd.warm([_text(document) for document in documents], progress)
        return self

    def clear_cache(self) -> None:
        """Forget the keys and values kept of earlier prompts, in memory, of all who share these weights."""
        self._rasd.clear_cache()

    def close(self) -> None:
        """Let go of the model. Calls after this raise."""
        self._rasd.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a copy that shares the engine: weights are not copied with options."""
        return self.model_copy()

    def _make_engine(self, loaded: Sequence[Any] | None) -> RASD:
        options = {name: getattr(self, name) for name in _ENGINE_OPTIONS}
        options["speculation"] = self.speculation.with_draft_tokens(self.num_draft_tokens)
        for name in ("prefix_cache_bytes", "prefix_cache_dir", "prefix_cache_dir_bytes"):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if loaded is None:
            return RASD(self.model, **options)
        if self.model_kwargs:
            msg = f"model_kwargs {sorted(self.model_kwargs)} come too late: the model is loaded."
            raise ConfigurationError(msg)
        return RASD.from_model(*loaded, **options)

    def _sampling(self, changes: Mapping[str, Any]) -> SamplingParams:
        """Return how to draw one answer: the fields, with a call's own options over them.

        Raises:
            ConfigurationError: An unknown option or a value out of its range.
        """
        own = {name: getattr(self, name) for name in _SAMPLING_OPTIONS}
        given = {name: value for name, value in _one_name(changes).items() if value is not None}
        if "drafter" in changes:
            given.pop("drafter", None)
            given["drafting"] = self._drafting(changes["drafter"])
        if (wanted := given.pop("response_format", None)) is not None:
            given["grammar"] = _grammar(wanted, given.get("grammar"))
        try:
            return updated(SamplingParams(**own), given, f"a call of {type(self).__name__}")
        except TypeError as err:
            values = {**own, **given}
            msg = f"An option has a value of the wrong type among {values}: {err}."
            raise ConfigurationError(msg) from err

    def _drafting(self, drafter: object) -> bool:
        """Whether a call drafts whose ``drafter`` option says so.

        Raises:
            ConfigurationError: It names another drafter than this LLM has.
        """
        if drafter is None:
            return False
        if drafter is self.drafter or drafter == self.drafter:
            return True
        msg = (
            f"drafter is {drafter!r} for one call, but a call can only go without (drafter=None). Make "
            f"another {type(self).__name__} for another drafter; a model that is loaded is shared."
        )
        raise ConfigurationError(msg)


def _retriever_in(pipeline: Any) -> Any:
    """Return the retriever that a query engine, chat engine or tool asks, else ``pipeline`` itself."""
    for name in ("_query_engine", "_retriever"):
        if (inner := getattr(pipeline, name, None)) is not None:
            return _retriever_in(inner)
    return pipeline


def _one_name(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``options`` with ``max_new_tokens`` under its first name.

    Raises:
        ConfigurationError: Both names are given and differ.
    """
    renamed = dict(options)
    if _ALIAS not in renamed:
        return renamed
    value = renamed.pop(_ALIAS)
    if renamed.setdefault("max_tokens", value) != value:
        msg = f"max_tokens is {renamed['max_tokens']} and {_ALIAS} is {value}; give one of them."
        raise ConfigurationError(msg)
    return renamed


def _grammar(wanted: Any, other: object) -> Grammar | None:
    """Return the grammar of a ``response_format``: OpenAI's mapping, or a pydantic class.

    Raises:
        ConfigurationError: It is neither, or the call names a ``grammar`` besides.
    """
    if other is not None:
        msg = "response_format and grammar both say what the answer must match; give one of them."
        raise ConfigurationError(msg)
    if isinstance(wanted, type) and issubclass(wanted, BaseModel):
        try:
            schema = wanted.model_json_schema()
        except PydanticUserError as err:
            msg = f"response_format is {wanted.__name__}, which has no JSON schema: {err}."
            raise ConfigurationError(msg) from err
        return Grammar.json_schema(without_unique_items(schema))
    return Grammar.of_response_format(wanted)


def _first(err: ValidationError) -> str:
    error = err.errors()[0]
    name = ".".join(str(part) for part in error["loc"])
    return f"{name} is {error['input']!r}: {error['msg']}."


def _text(document: str | BaseNode) -> str:
    if isinstance(document, str):
        return document
    return document.get_content(metadata_mode=MetadataMode.LLM)
