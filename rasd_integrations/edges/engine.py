"""What answers the calls of both frameworks' models: a model in this process, or one behind HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.prompting import Prompt
from rasd_integrations.response_format import ToolUse
from rasd_integrations.runtime.lazy_engine import LoadedName
from rasd_integrations.runtime.pipeline import Progress, Request
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.serving.client.connection import ServerOptions
from rasd_integrations.serving.client.remote import RemoteRASD
from rasd_integrations.stats import DecodingStats
from rasd_integrations.text.answer.explanation import Explanation
from rasd_integrations.text.answer.logprobs import openai_logprobs
from rasd_integrations.types import Generation, TextDelta, TokenLogprob, WrittenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SERVER_OPTIONS = ("base_url", "api_key", "timeout", "max_retries", "client_kwargs")
NEVER_KEPT = ("api_key", "client_kwargs")
"""What neither dumps nor pickles hold."""
SETTINGS = (
    "drafter", "executor", "weights", "store", "deterministic", "memory", "cache_dir", "prefix_cache_bytes",
)  # fmt: skip
"""Engine options that are settings of our server, too."""
_EVERYWHERE = ("model", "context", "knowledge_transfer", "chat_template_kwargs")


class Engine(Protocol):
    """The calls that the frameworks' models make; see :class:`~rasd_integrations.runtime.rasd.RASD`."""

    @property
    def model_name(self) -> str:
        """The model's name."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """All that affects the output besides prompt and sampling, as plain JSON."""
        ...

    @property
    def stats(self) -> DecodingStats:
        """Statistics of all answers."""
        ...

    @property
    def window(self) -> int | None:
        """Longest sequence of prompt and answer, in tokens, if it is known."""
        ...

    @property
    def max_tokens(self) -> int:
        """Longest answer of a call without ``max_tokens``."""
        ...

    @property
    def has_chat_template(self) -> bool:
        """True if messages can be formatted."""
        ...

    @property
    def has_reasoning(self) -> bool:
        """True if reasoning is marked in the output."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own tokenizer."""
        ...

    def ensure_loaded(self) -> None:
        """Load the weights now, or find the server."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without special tokens."""
        ...

    def count_tokens(self, prompt: Prompt, tools: ToolUse | None = None) -> int:
        """Return the number of tokens of a prompt, template and tools included."""
        ...

    def stream(self, prompt: Request, /) -> Generator[TextDelta, None, None]:
        """Check now, answer lazily; closing the iterator stops the answer."""
        ...

    def stream_to_end(self, request: Request, /) -> Generator[TextDelta, None, None]:
        """Stream an answer that is read to its end at once."""
        ...

    def astream(self, prompt: Request, /) -> AsyncGenerator[TextDelta, None]:
        """Stream without blocking the event loop."""
        ...

    def generate(self, prompt: Request, /) -> Generation:
        """Return the whole answer."""
        ...

    async def agenerate(self, prompt: Request, /) -> Generation:
        """Return the whole answer without blocking the event loop."""
        ...

    def explain(self, prompt: Request, /) -> Explanation:
        """Answer; return where drafts came from."""
        ...

    def attach(self, store: object) -> None:
        """Search chunks in ``store``."""
        ...

    def warm(self, documents: Sequence[Prompt], progress: Progress | None = None) -> None:
        """Prefill documents ahead of questions."""
        ...

    def forget(self, text: str | None = None) -> int:
        """Forget earlier answers; return how many."""
        ...

    def clear_cache(self) -> None:
        """Drop the keys and values of earlier prompts."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


def logprob_entries(
    engine: Engine, logprobs: Sequence[TokenLogprob | WrittenLogprob]
) -> list[dict[str, Any]]:
    """Return tokens' log-probabilities in OpenAI's form; a server has written them so."""
    written = [dict(one.entry) for one in logprobs if isinstance(one, WrittenLogprob)]
    if len(written) == len(logprobs):
        return written
    return openai_logprobs(engine.tokenizer, logprobs)


def check_place(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse options of a model that belong to one elsewhere: in this process, or behind HTTP.

    Raises:
        ConfigurationError: One of ``options`` does, and is not its default.
    """
    base_url, model = options["base_url"], options["model"]
    # Of one type first: == of a user's store may do anything.
    names = [
        name
        for name, value in options.items()
        if value is not (own := defaults[name]) and not (type(value) is type(own) and value == own)
    ]
    for name in names:
        if base_url is None and name in SERVER_OPTIONS:
            msg = f"{name} is an option of a server, but no base_url is given. Give that too, or leave {name} out."
            raise ConfigurationError(msg)
        if base_url is not None and name not in (*SERVER_OPTIONS, *_EVERYWHERE):
            flag = f"rasd serve MODEL --{name.replace('_', '-')} ..."
            there = "rasd serve has no setting of it"
            if name in SETTINGS:
                there = f"where it matters, start the server with it: {flag}"
            elif name == "namespace":
                there = "rasd serve gives each API key its own"
            msg = f"{name} is set beside base_url, but is decided where the model is loaded. Leave it out; {there}."
            raise ConfigurationError(msg)
    if base_url is not None and isinstance(model, LoadedName):
        msg = (
            f"base_url is {base_url!r}, but the model given is loaded here. Leave one of them out."
        )
        raise ConfigurationError(msg)


def new_engine(fields: Mapping[str, Any]) -> Engine:
    """Return what answers with the engine options ``fields`` of a model.

    Raises:
        ConfigurationError: The options contradict each other.
    """
    options = dict(fields)
    server = {name: options.pop(name) for name in SERVER_OPTIONS}
    if server["base_url"] is not None:
        given = {name: options[name] for name in _EVERYWHERE}
        return RemoteRASD(ServerOptions(**server), given.pop("model"), **given)
    model, model_kwargs = options.pop("model"), options.pop("model_kwargs")
    draft_tokens = options.pop("num_draft_tokens")
    options["speculation"] = options["speculation"].with_draft_tokens(draft_tokens)
    if not isinstance(model, LoadedName):
        return RASD(model, model_kwargs=model_kwargs, **options)
    if model_kwargs:
        msg = f"model_kwargs {sorted(model_kwargs)} come too late: the model is loaded."
        raise ConfigurationError(msg)
    return RASD.from_model(model.model, model.tokenizer, model.drafter_model, **options)
