"""The options of the LangChain and LlamaIndex models, and what both do with them.

Answer options are those of :class:`~rasd_integrations.config.SamplingParams`; the others are the engine's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    SkipValidation,
    ValidationError,
    field_serializer,
    field_validator,
)
from typing_extensions import Self

from rasd_integrations.config import (
    ContextMode,
    ExecutorName,
    OnCut,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
    WeightsName,
    check_model_name,
    reject_unknown,
    updated,
)
from rasd_integrations.drafters.base import Drafter, drafter_name
from rasd_integrations.edges.engine import Engine, check_place, new_engine
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.response_format import Grammar
from rasd_integrations.runtime.lazy_engine import LoadedName
from rasd_integrations.runtime.modes import mode_name
from rasd_integrations.runtime.pipeline import Progress
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.logprobs import num_alternatives
from rasd_integrations.transfer import rule_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NONE_IS_A_VALUE = ("drafter", "seed")  # of a call; None of another option is the field's own value
_CONFIGS: Mapping[str, Any] = {"retrieval": RetrievalConfig(), "speculation": SpeculationConfig()}


def _engine(default: Any, description: str, **more: Any) -> Any:
    """Return an option that decides the engine, set once."""
    return Field(default=default, description=description, frozen=True, **more)


def _answer(description: str, default: Any = None) -> Any:
    """Return an option of one answer, which a call may override."""
    return Field(default=default, description=description)


class FrameworkModel(BaseModel, ABC):
    """Fields, engine and life cycle of both frameworks' models.

    Engine options are frozen. Answer options may be set again at any time, or given to a call.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    model: str = Field(
        frozen=True,
        description="Hub id, local folder, or path of a .gguf file. Loaded at the first call, or by load().",
    )
    drafter: SkipValidation[str | Path | Drafter | None] = _engine(
        "auto",
        '"auto", None (plain decoding), "self", hub id or path of a small LM, or a Drafter object.',
    )
    drafter_device: str | None = _engine(
        None, 'Device of a drafter model: "cpu", "cuda:1", ...; None: the target\'s.'
    )
    executor: ExecutorName = _engine(
        "auto",
        'What runs steps: "auto", "eager" (torch), "openvino", "openvino-kv8" or "cuda-graphs".',
    )
    weights: WeightsName = _engine(
        "auto", '"dense", "kept" (a GGUF file\'s own blocks), "int8", "int4"; "auto": what fits.'
    )
    store: SkipValidation[object] = _engine(
        None,
        "What as_chunk_source() takes: vector store, retriever, collection, texts, ... See attach().",
        exclude=True,
        repr=False,
    )
    temperature: float | None = _answer(
        "0 is greedy. None, here and below: the checkpoint's generation_config, else greedy."
    )
    top_p: float | None = _answer("Nucleus in (0, 1]; 1 is off, the default.")
    top_k: int | None = _answer("Most likely tokens kept; 0 is off, the default.")
    min_p: float | None = _answer(
        "Least probability, as a share of the most likely token's; 0 is off, the default."
    )
    repetition_penalty: float | None = _answer(
        "Divides the scores of tokens in prompt and answer; 1 is off, the default."
    )
    no_repeat_ngram_size: int | None = _answer(
        "No run of so many tokens occurs twice; 0 is off, the default."
    )
    max_tokens: int | None = _answer("Longest answer, in tokens; 512 by default.")
    stop: str | list[str] | None = _answer("Strings that end the answer; they are not part of it.")
    seed: int | None = _answer("Seed of the draws; None takes a fresh one for each answer.")
    logprobs: bool | None = _answer("Report the log-probability of each token, as OpenAI does.")
    top_logprobs: int | None = _answer(
        "With logprobs=True: report so many of the most likely tokens at each position, 0 to 20."
    )
    use_generation_config: bool = _answer(
        "Use the checkpoint's own options and masks if none are set.", default=True
    )
    on_cut: OnCut = _answer(
        'If max_tokens ends a structured answer or forced call: "close" it and warn, or "raise".',
        default="close",
    )
    context: ContextMode = _engine(
        "prompt",
        'What the target reads: the "prompt" as sent, or the whole "documents" of its chunks.',
    )
    knowledge_transfer: SkipValidation[Any] = _engine(
        None,
        'Joins the answer with what a drafter model, or the target itself, says on the retrieved chunks: "cautious", '
        '"confidence", "agreement", "mixture", "rapid", or a TransferRule; None is lossless.',
    )
    deterministic: bool = _engine(
        False, "The same call gives the same text, whatever was cached, drafted or batched; slower."
    )
    model_kwargs: dict[str, Any] = _engine(
        {},
        "Passed to from_pretrained: dtype, device_map, revision, token, ... Never dumped.",
        exclude=True,
        repr=False,
    )
    chat_template_kwargs: dict[str, Any] = _engine(
        {}, "Passed to the chat template: enable_thinking, ..."
    )
    num_draft_tokens: int | None = _engine(
        None, "Draft length; None lets the schedule choose it. Changes time only, never the answer."
    )
    retrieval: RetrievalConfig = _engine(
        RetrievalConfig(), "How chunks are found; a dict of its names is taken too."
    )
    speculation: SpeculationConfig = _engine(
        SpeculationConfig(), "How drafts are made and judged; a dict of its names is taken too."
    )
    prefix_cache_bytes: int | None = _engine(
        None, "Memory for the KV of earlier prompts; None: an eighth of what is free after loading."
    )
    cache_dir: str | Path | None = _engine(
        None,
        "Folder for all that later processes find again, KV of what warm() read included; None: the user's cache "
        "folder, for converted and compiled models only.",
    )
    prefix_disk_bytes: int | None = _engine(
        None, "Most that the KV of what warm() read may take in cache_dir; None: 32 GiB."
    )
    namespace: str = _engine(
        "", "KV is reused, and answers are drafted from, only within a namespace."
    )
    memory: bool | str | Path = _engine(
        True,
        "Draft from the store's texts and from earlier answers: True (in this process), False, or a folder that keeps "
        "them for later ones.",
    )

    mode: SkipValidation[Any] = _engine(
        None,
        'None, "route" (answer from the chunks, from whole documents where that is in doubt), "speculative-rag" (the '
        "best of several answers from parts of the chunks), or a Mode.",
    )

    base_url: str | None = _engine(
        None,
        "Address of a server that has the model, /v1 included; None: it is loaded in this process.",
    )
    api_key: SecretStr | None = _engine(
        None, "The server's; None: OPENAI_API_KEY. Never dumped.", exclude=True, repr=False
    )
    timeout: float | None = _engine(
        None, "Seconds without a byte from the server; None: the openai package's, ten minutes."
    )
    max_retries: int | None = _engine(
        None, "Of a request before its answer; None: the openai package's, 2."
    )
    client_kwargs: dict[str, Any] = _engine(
        {},
        "Passed to openai.OpenAI and AsyncOpenAI: default_headers, http_client, http_async_client, ... Never dumped.",
        exclude=True,
        repr=False,
    )

    _rasd: Engine = PrivateAttr()

    def __init__(self, model: str | Path = "", **options: Any) -> None:
        """Check the options. Load no weights and touch no network; the first call does, or ``load()``.

        Raises:
            ConfigurationError: An unknown option, a value out of its range, or a contradiction.
        """
        cls = type(self)
        reject_unknown(options, cls.model_fields, cls.__name__)
        if options.get("base_url") is None or model != "":
            check_model_name(model, cls.__name__)
        try:
            super().__init__(**{**options, "model": model})
        except ValidationError as err:
            faults = [
                f"{'.'.join(map(str, e['loc']))} is {_shown(e)}: {e['msg']}." for e in err.errors()
            ]
            raise ConfigurationError(" ".join(faults)) from err
        self._sampling({})
        check_place(self._engine_fields(), {n: f.default for n, f in cls.model_fields.items()})
        self._rasd = self._engine()

    def model_post_init(self, context: Any, /) -> None:
        """Go on to the framework's own, which pydantic's for private attributes would hide."""
        super().model_post_init(context)

    @field_validator("model", mode="plain")
    @classmethod
    def _model_as_text(cls, value: object) -> str:
        return value if isinstance(value, LoadedName) else str(value)

    @field_serializer("drafter")
    def _drafter_as_text(self, drafter: str | Path | Drafter | None) -> str | None:
        return drafter_name(drafter)

    @field_serializer("knowledge_transfer")
    def _rule_as_text(self, rule: Any) -> str | None:
        return rule_name(rule)

    @field_serializer("mode")
    def _mode_as_text(self, mode: Any) -> str | None:
        return mode_name(mode)

    @field_serializer("speculation")
    def _speculation_as_dict(self, config: SpeculationConfig) -> dict[str, Any]:
        return asdict(config) | {"knowledge_transfer": rule_name(config.knowledge_transfer)}

    @field_validator("retrieval", "speculation", mode="before")
    @classmethod
    def _config_from_mapping(cls, value: object, info: Any) -> object:
        if not isinstance(value, Mapping):
            return value
        return updated(_CONFIGS[info.field_name], value, info.field_name)

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drafter_model: PreTrainedModel | None = None,
        **options: Any,
    ) -> Self:
        """Return a model over objects that are loaded already; ``options`` as in the constructor."""
        return cls(LoadedName(model, tokenizer, drafter_model), **options)

    def _engine_fields(self) -> dict[str, Any]:
        return {name: value for name, value in self if name in ENGINE_OPTIONS}

    def _engine(self) -> Engine:
        """Return what answers."""
        return new_engine(self._engine_fields())

    # --- the engine's own calls ---

    def load(self) -> Self:
        """Load the weights now; return itself."""
        self._rasd.ensure_loaded()
        return self

    def warm(self, documents: Sequence[Any], progress: Progress | None = None) -> Self:
        """Prefill documents ahead of the questions on them and keep their KV, also in a ``cache_dir``.

        Args:
            documents: Texts, or the framework's own documents.
            progress: Called with tokens done and tokens in all.
        """
        self._rasd.warm([self._document_text(document) for document in documents], progress)
        return self

    @abstractmethod
    def _document_text(self, document: Any) -> str:
        """Return a document as prompts show it."""

    def clear_cache(self) -> None:
        """Drop the KV of earlier prompts from memory, for all who share these weights."""
        self._rasd.clear_cache()

    def forget(self, text: str | None = None) -> int:
        """Forget the earlier answers of this namespace, or those that hold ``text``; return how many."""
        return self._rasd.forget(text)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer, for text splitters; loads no weights."""
        return self._rasd.tokenizer

    @property
    def stats(self) -> DecodingStats:
        """Statistics of all answers; each answer also carries its own."""
        return self._rasd.stats

    def close(self) -> None:
        """Free weights and caches, unless another model shares them; later calls raise."""
        self._rasd.close()

    def __enter__(self) -> Self:
        """Return the model; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the model."""
        self.close()

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Return a copy that shares the engine: weights are never copied along with options."""
        return self.__copy__()

    # --- the options of one call ---

    def _sampling(self, changes: Mapping[str, Any]) -> SamplingParams:
        """Return the fields, with a call's own options in their place.

        Raises:
            ConfigurationError: An unknown option or a value out of its range.
        """
        own = {name: value for name, value in self if name in ANSWER_OPTIONS}
        given = {n: v for n, v in changes.items() if v is not None or n in _NONE_IS_A_VALUE}
        if given.get("logprobs") is False:
            own["top_logprobs"] = None
        asked = own.pop("logprobs")
        given["top_logprobs"] = num_alternatives(
            given.pop("logprobs", asked), given.get("top_logprobs", own["top_logprobs"])
        )
        if "drafter" in given:
            given["drafting"] = self._drafting(given.pop("drafter"))
        if "response_format" in given:
            if "grammar" in given:
                msg = "response_format and grammar both say what the answer must match; give one of them."
                raise ConfigurationError(msg)
            given["grammar"] = self._grammar(given.pop("response_format"))
        try:
            return updated(SamplingParams(**own), given, f"a call of {type(self).__name__}")
        except TypeError as err:
            msg = f"An option has a value of the wrong type among { ({**own, **given}) }: {err}."
            raise ConfigurationError(msg) from err

    def _drafting(self, asked: Any) -> bool:
        """Return whether a call with ``drafter=asked`` drafts; a call may only turn drafting off.

        Raises:
            ConfigurationError: It names another drafter than this model has.
        """
        if asked is None:
            return False
        if asked is self.drafter or asked == self.drafter or (asked == "auto" and self.drafter):
            return True
        msg = (
            f"drafter is {asked!r} for this call, but the model was built with {self.drafter!r}. Pass None "
            f"to decode plainly, or build another model for another drafter."
        )
        raise ConfigurationError(msg)

    @abstractmethod
    def _grammar(self, response_format: Any) -> Grammar | None:
        """Return the grammar of OpenAI's mapping, or of a class with a schema.

        Raises:
            ConfigurationError: It is neither.
        """


def _shown(fault: Any) -> str:
    return (
        "hidden" if fault["loc"][:1] in (("api_key",), ("client_kwargs",)) else repr(fault["input"])
    )


ENGINE_OPTIONS = tuple(n for n, f in FrameworkModel.model_fields.items() if f.frozen)
ANSWER_OPTIONS = tuple(n for n, f in FrameworkModel.model_fields.items() if not f.frozen)
