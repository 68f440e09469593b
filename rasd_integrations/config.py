"""Options as frozen dataclasses; every value is checked here."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from rasd_integrations.errors import ConfigurationError, advice
from rasd_integrations.response_format import Grammar
from rasd_integrations.transfer import TransferRule, transfer_rule

StorePolicy = Literal["prompt", "store", "any"]
ContextMode = Literal["prompt", "documents"]
ExecutorName = Literal["auto", "eager", "openvino", "openvino-kv8", "cuda-graphs"]
WeightsName = Literal["auto", "dense", "kept", "int8", "int4"]
OnCut = Literal["close", "raise"]
_T = TypeVar("_T")

DEFAULT_PREFIX_DISK_BYTES = 32 << 30


def check_value(ok: bool, name: str, value: object, limit: str) -> None:
    """Raise :class:`ConfigurationError` unless ``ok``."""
    if not ok:
        msg = f"{name} is {value!r}, but must be {limit}."
        raise ConfigurationError(msg)


def check_engine(
    context: object,
    executor: object,
    weights: object,
    prefix_cache_bytes: int | None,
    *,
    deterministic: object,
) -> None:
    """Check the engine's own options.

    Raises:
        ConfigurationError: A value is out of range, or two options contradict each other.
    """
    check_value(context in ("prompt", "documents"), "context", context, "'prompt' or 'documents'")
    names = get_args(ExecutorName)
    check_value(executor in names, "executor", executor, "one of " + ", ".join(map(repr, names)))
    names = get_args(WeightsName)
    check_value(weights in names, "weights", weights, "one of " + ", ".join(map(repr, names)))
    limit = "at least 0 (0 keeps nothing)"
    fits = prefix_cache_bytes is None or prefix_cache_bytes >= 0
    check_value(fits, "prefix_cache_bytes", prefix_cache_bytes, limit)
    check_value(isinstance(deterministic, bool), "deterministic", deterministic, "True or False")
    if deterministic and executor == "cuda-graphs":
        msg = (
            "deterministic=True contradicts executor='cuda-graphs', which runs a step recorded or not, and with "
            "other roundings. Use executor='eager'."
        )
        raise ConfigurationError(msg)


def check_memory(memory: object) -> None:
    """Raise ``ConfigurationError`` unless ``memory`` is True, False or a folder's path."""
    fits = isinstance(memory, bool | Path) or (isinstance(memory, str) and memory.strip())
    check_value(bool(fits), "memory", memory, "True, False, or the path of a folder")


def check_model_name(model: object, where: str) -> None:
    """Raise ``ConfigurationError`` unless ``model`` is a non-empty text or a path.

    ``where`` is the class it was given to.
    """
    if isinstance(model, Path) or (isinstance(model, str) and model):
        return
    if isinstance(model, str):
        msg = f"{where} has no model. Give model=: a hub id, a folder, or the path of a .gguf file."
    else:
        msg = (
            f"model is a {type(model).__name__}, but must be a hub id or a path. Objects that are loaded "
            f"already go to {where}.from_model(model, tokenizer)."
        )
    raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class CacheDir:
    """Where files are kept between processes.

    Attributes:
        path: An existing, writable folder that the user named; ``None``: the user's cache folder, for what is made
            of models alone.
        prefix_bytes: Maximum total size of the warmed documents' files.
    """

    path: Path | None = None
    prefix_bytes: int = DEFAULT_PREFIX_DISK_BYTES

    @classmethod
    def of(cls, path: str | Path | None, prefix_bytes: int | None) -> CacheDir:
        """Return the folder of the options, created if missing.

        Raises:
            ConfigurationError: It cannot be written to, a value is out of range, or a limit has no folder.
        """
        limit = DEFAULT_PREFIX_DISK_BYTES if prefix_bytes is None else prefix_bytes
        check_value(limit > 0, "prefix_disk_bytes", limit, "above 0")
        if path is None:
            if prefix_bytes is not None:
                msg = (
                    f"prefix_disk_bytes is {prefix_bytes}, but warmed documents are on disk only in a cache_dir. "
                    f"Give cache_dir, or leave it out."
                )
                raise ConfigurationError(msg)
            return cls()
        given: object = path
        check_value(isinstance(given, str | Path) and path != "", "cache_dir", path, "a path")
        folder = Path(path).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as err:
            msg = (
                f"cache_dir is {str(path)!r}, which cannot be written to ({err.strerror}). Give a folder that "
                f"can, or leave the option out."
            )
            raise ConfigurationError(msg) from err
        return cls(folder, limit)


def reject_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ``ConfigurationError`` for the first of ``names`` that is not ``known``, with advice."""
    options = set(known)
    for name in names:
        if name not in options:
            msg = f"Unknown option {name!r} for {where}. {advice(name, options)}"
            raise ConfigurationError(msg)


def check_passed_on(option: str, names: Iterable[str]) -> None:
    """Raise ``ConfigurationError`` if ``option``, which is passed on, has an option of the LLM."""
    own = {"max_new_tokens", "do_sample", *(f.name for f in fields(SamplingParams))}
    for name in sorted(own.intersection(names)):
        msg = f"{option} has {name!r}, which would have no effect there. Give it to the LLM itself."
        raise ConfigurationError(msg)


def updated(options: _T, changes: Mapping[str, Any], where: str) -> _T:
    """Return ``options`` with ``changes`` applied; unknown names are refused.

    Raises:
        ConfigurationError: A name is unknown, or a value out of range.
    """
    reject_unknown(changes, (f.name for f in fields(options)), where)  # type: ignore[arg-type]
    return replace(options, **changes)  # type: ignore[type-var]


_WHOLE = ("top_k", "no_repeat_ngram_size", "max_tokens", "seed", "top_logprobs")
_SAMPLING_RANGES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("temperature", lambda v: 0 <= v < math.inf, "at least 0, and finite"),
    ("top_p", lambda v: 0 < v <= 1, "in (0, 1]"),
    ("top_k", lambda v: v >= 0, "at least 0 (0 is off)"),
    ("min_p", lambda v: 0 <= v <= 1, "in [0, 1] (0 is off)"),
    ("repetition_penalty", lambda v: 0 < v < math.inf, "above 0 (1 is off)"),
    ("no_repeat_ngram_size", lambda v: v >= 0, "at least 0 (0 is off)"),
    ("max_tokens", lambda v: v >= 1, "at least 1"),
    ("seed", lambda _: True, "a whole number"),
    ("top_logprobs", lambda v: 0 <= v <= 20, "in [0, 20]"),
)
SAMPLING_DEFAULTS: Mapping[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "max_tokens": 512,
    "stop": (),
}
"""Values of options that neither the caller nor the checkpoint sets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one answer is sampled; set per call.

    From ``temperature`` to ``stop``, ``None`` means the checkpoint's ``generation_config``, else
    :data:`SAMPLING_DEFAULTS`.

    Attributes:
        temperature: 0 is greedy; else the logits are divided by it.
        top_p: Nucleus in (0, 1]; 1 is off.
        top_k: Number of most likely tokens kept; 0 is off.
        min_p: Least probability of a token, as a share of the most likely one's, in [0, 1]; 0 is off.
        repetition_penalty: Divides the scores of tokens in prompt and answer, above 0; 1 is off.
        no_repeat_ngram_size: No n-gram of this size occurs twice in prompt and answer; 0 is off.
        max_tokens: Maximum length of the answer, in tokens.
        stop: Strings that end the answer and are not part of it, or one string.
        seed: Random seed; ``None`` takes a fresh one.
        ignore_eos: Continue past end tokens (for benchmarks).
        grammar: Constrains the answer's text.
        knowledge_transfer: A rule, see :func:`~rasd_integrations.transfer.transfer_rule`; "none" is lossless,
            ``None`` follows the engine, and is off under a grammar or tools.
        drafting: ``False`` is plain decoding.
        scored: Report the answer's log-probability at temperature 1 (``DecodingStats.logprob``).
        top_logprobs: Report each token's, and those of so many most likely tokens in its place (``logprobs``).
        use_generation_config: Use the checkpoint's values for ``None``, and its masks
            (``suppress_tokens``, ``bad_words_ids``, ...).
        on_cut: When ``max_tokens`` ends a constrained answer, ``"close"`` completes JSON with the shortest values
            its schema allows, warns and names them; ``"raise"`` is an error instead.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] | None = None
    seed: int | None = None
    ignore_eos: bool = False
    grammar: Grammar | None = None
    knowledge_transfer: Any = None
    drafting: bool = True
    scored: bool = False
    top_logprobs: int | None = None
    use_generation_config: bool = True
    on_cut: OnCut = "close"

    def __post_init__(self) -> None:
        """Check the ranges."""
        given: Any = self.stop
        if given is not None:
            stop = (given,) if isinstance(given, str) else tuple(given)
            object.__setattr__(self, "stop", stop)
            check_value(
                all(isinstance(s, str) and s for s in stop), "stop", stop, "non-empty strings"
            )
        for name, ok, limit in _SAMPLING_RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            kinds, what = (int, "a whole number") if name in _WHOLE else (int | float, "a number")
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            check_value(is_number, name, value, f"{what} or None")
            check_value(ok(value), name, value, limit)
        transfer_rule(self.knowledge_transfer)
        grammar = self.grammar
        check_value(
            grammar is None or isinstance(grammar, Grammar), "grammar", grammar, "a Grammar"
        )
        check_value(self.on_cut in get_args(OnCut), "on_cut", self.on_cut, "'close' or 'raise'")

    def settled(self, checkpoint: Mapping[str, Any]) -> Sampling:
        """Return the options with every ``None`` resolved.

        Args:
            checkpoint: The options that the model's ``generation_config`` sets.

        Raises:
            ConfigurationError: The checkpoint sets a value out of range.
        """
        given = {f.name: getattr(self, f.name) for f in fields(SamplingParams)}
        own = checkpoint if self.use_generation_config else {}
        for name, default in SAMPLING_DEFAULTS.items():
            if given[name] is None:
                given[name] = own.get(name, default)
        return Sampling(**given)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling(SamplingParams):
    """The resolved options of one answer; see :meth:`SamplingParams.settled`."""

    temperature: float = SAMPLING_DEFAULTS["temperature"]
    top_p: float = SAMPLING_DEFAULTS["top_p"]
    top_k: int = SAMPLING_DEFAULTS["top_k"]
    min_p: float = SAMPLING_DEFAULTS["min_p"]
    repetition_penalty: float = SAMPLING_DEFAULTS["repetition_penalty"]
    no_repeat_ngram_size: int = SAMPLING_DEFAULTS["no_repeat_ngram_size"]
    max_tokens: int = SAMPLING_DEFAULTS["max_tokens"]
    stop: tuple[str, ...] = SAMPLING_DEFAULTS["stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    """How drafts are made and verified; set per engine.

    Attributes:
        num_draft_tokens: Draft length; ``None`` lets the schedule choose it by measured times.
        max_draft_tokens: Longest draft (nodes of a tree) that the schedule may choose.
        knowledge_transfer: A rule, see :func:`~rasd_integrations.transfer.transfer_rule`; ``None`` is lossless.
    """

    num_draft_tokens: int | None = None
    max_draft_tokens: int = 16
    knowledge_transfer: Any = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        n = self.num_draft_tokens
        check_value(n is None or n >= 0, "num_draft_tokens", n, "at least 0, or None")
        check_value(
            self.max_draft_tokens >= 1, "max_draft_tokens", self.max_draft_tokens, "at least 1"
        )
        transfer_rule(self.knowledge_transfer)

    def with_draft_tokens(self, asked: int | None) -> SpeculationConfig:
        """Return this with the draft length of an LLM's own option, if that is set.

        Raises:
            ConfigurationError: Another length is set here.
        """
        return self._with("num_draft_tokens", asked)

    def with_transfer(self, asked: Any) -> SpeculationConfig:
        """Return this with the transfer rule of an LLM's own option, if that is set.

        Raises:
            ConfigurationError: Another rule is set here.
        """
        return self._with("knowledge_transfer", asked)

    def _with(self, name: str, asked: Any) -> SpeculationConfig:
        own = getattr(self, name)
        if asked is None or asked == own:
            return self
        if own is not None:
            msg = f"{name} is {asked!r} and speculation.{name} is {own!r}; give one of them."
            raise ConfigurationError(msg)
        return replace(self, **{name: asked})

    @property
    def lossless(self) -> bool:
        """True if the output follows the target's own distribution."""
        return self.rule is None

    @property
    def rule(self) -> TransferRule | None:
        """What joins the distributions of target and teacher, if anything does."""
        return transfer_rule(self.knowledge_transfer)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalConfig:
    """How chunks are found and how long the drafter's prompt may be; set per engine.

    Attributes:
        k: Number of chunks to ask the store for.
        timeout_s: Seconds after which decoding continues without the store.
        store_policy: What of the store is drafted from. ``"prompt"``: chunks in the target's prompt. ``"store"``: also
            all that the pipeline's own search may return, under its filter. ``"any"``: also whatever a search
            of ours returns, in the drafter's prompt (bypasses filters and tenants).
        chunk_tokens: Size of the pieces that a prompt without a store is cut into, in tokens.
        compression: RAPID's lambda, context / retrieval.
        min_tokens: RAPID's least retrieved tokens.
        max_share: Longest context of the drafter, as a share of the target's prompt.
        gate_share: Longest prompt of the drafter, as a share of the target's prompt.
        gate_tokens: Shortest target prompt with a drafter prompt of its own, in tokens.
    """

    k: int = 16
    timeout_s: float = 2.0
    store_policy: StorePolicy = "store"
    chunk_tokens: int = 128
    compression: float = 24.0
    min_tokens: int = 4096
    max_share: float = 0.125
    gate_share: float = 0.5
    gate_tokens: int = 1024

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_value(self.k >= 1, "k", self.k, "at least 1")
        check_value(self.timeout_s > 0, "timeout_s", self.timeout_s, "positive")
        check_value(
            self.store_policy in get_args(StorePolicy),
            "store_policy",
            self.store_policy,
            "'prompt', 'store' or 'any'",
        )
        check_value(self.chunk_tokens >= 16, "chunk_tokens", self.chunk_tokens, "at least 16")
        check_value(self.compression >= 1, "compression", self.compression, "at least 1")
        check_value(0 < self.max_share <= 1, "max_share", self.max_share, "in (0, 1]")
        check_value(0 < self.gate_share <= 1, "gate_share", self.gate_share, "in (0, 1]")

    def drafter_budget(self, prompt_tokens: int) -> int:
        """Return how many tokens of context the drafter may read.

        RAPID's k * chunk = max(N / lambda, min(4096, N)) (arXiv 2502.20330, code), capped at a share of
        the prompt so that the drafter stays cheap on prompts under 32K; at least two chunks.
        """
        rapid = max(prompt_tokens / self.compression, min(self.min_tokens, prompt_tokens))
        return int(max(2 * self.chunk_tokens, min(rapid, prompt_tokens * self.max_share)))
