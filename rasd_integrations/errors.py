"""The errors of the package.

::

    RASDError
    ├── ConfigurationError          (also ValueError)
    │   └── VocabularyMismatchError
    ├── PromptError                 (also ValueError)
    ├── ContextOverflowError        (also RuntimeError)
    │   └── PromptTooLongError      (also PromptError)
    ├── ModelLoadError              (also OSError)
    ├── StorageError                (also OSError)
    ├── RetrievalError              (also RuntimeError)
    ├── DecodingError               (also RuntimeError)
    ├── DeviceMemoryError           (also MemoryError)
    ├── ServerError                 (also ConnectionError)
    │   └── ServerTimeoutError      (also TimeoutError)
    └── MissingDependencyError      (also ImportError)

Every message names the value, the limit and the next step. LlamaIndex takes ``ValueError`` for a malformed
answer, so inside its pipelines such errors are raised as ``RuntimeError`` (ADR 13).
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


class RASDError(Exception):
    """Base class of the package's errors."""


class ConfigurationError(RASDError, ValueError):
    """An option or a combination of options is invalid."""


class VocabularyMismatchError(ConfigurationError):
    """The drafter has another vocabulary, and it cannot or may not be translated."""


class PromptError(RASDError, ValueError):
    """The prompt is invalid."""


class ContextOverflowError(RASDError, RuntimeError):
    """Prompt and answer together exceed the target's window."""

    def __init__(self, prompt_tokens: int, max_tokens: int, window: int) -> None:
        """Keep the sizes, in tokens."""
        super().__init__(prompt_tokens, max_tokens, window)  # errors are pickled by their args
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.window = window

    def __str__(self) -> str:
        excess = self.prompt_tokens + self.max_tokens - self.window
        if not self.prompt_tokens:  # a server that does not say
            return (
                f"The prompt, and max_tokens of {self.max_tokens}, exceed the model's window of {self.window} tokens. "
                f"Lower max_tokens, retrieve fewer or shorter chunks, or use a model with a longer context."
            )
        return (
            f"The prompt has {self.prompt_tokens} tokens and max_tokens is {self.max_tokens}, but the model's "
            f"window is {self.window}: {excess} too many. Lower max_tokens, retrieve fewer or shorter "
            f"chunks, or use a model with a longer context."
        )


class PromptTooLongError(ContextOverflowError, PromptError):
    """Prompt and answer together exceed the target's window, in a direct call."""


class ModelLoadError(RASDError, OSError):
    """A model, tokenizer or chat template is missing or broken."""


class StorageError(RASDError, OSError):
    """A file cannot be written; names its path, its size and the free space."""


class RetrievalError(RASDError, RuntimeError):
    """A store cannot be used as a chunk source."""


class DecodingError(RASDError, RuntimeError):
    """Decoding cannot continue: a closed engine, a grammar too large, a missing drafter."""


class DeviceMemoryError(RASDError, MemoryError):
    """A request does not fit in the device's memory; the engine stays usable."""


class ServerError(RASDError, ConnectionError):
    """A model server cannot be reached, is busy, refuses the key, or failed.

    ``status`` is that of HTTP; ``None``: there was no answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        """Keep the status."""
        super().__init__(message)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class ServerTimeoutError(ServerError, TimeoutError):
    """A model server sent nothing for longer than ``timeout`` allows."""


class MissingDependencyError(RASDError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        """Keep the missing module and the extra that installs it."""
        super().__init__(module, extra)
        self.module = module
        self.extra = extra

    def __str__(self) -> str:
        return f"'{self.module}' is not installed. Install it with: pip install 'rasd-integrations[{self.extra}]'"


# Other integrations' names of the options.
_SAME = {
    "model": ("model_name", "model_id", "model_path", "repo_id", "name_or_path", "checkpoint"),
    "max_tokens": (
        "max_new_tokens", "max_completion_tokens", "max_output_tokens", "num_output", "num_predict",
        "n_predict", "max_length",
    ),
    "stop": ("stop_sequences", "stop_strings", "stop_words", "stopping_ids"),
    "seed": ("random_seed", "generator"),
    "drafter": ("assistant_model", "draft_model", "drafter_model", "speculative_config", "speculative_model"),
    "num_draft_tokens": ("num_assistant_tokens", "num_speculative_tokens", "prompt_lookup_num_tokens"),
    "base_url": ("api_base", "openai_api_base", "endpoint", "server_url", "api_url"),
    "api_key": ("openai_api_key",),
    "timeout": ("request_timeout",),
    "store": ("vectorstore", "vector_store", "retriever", "index", "documents"),
}  # fmt: skip
_ELSEWHERE = {
    "model_kwargs={{'device_map': ...}}": ("device", "device_map", "n_gpu_layers"),
    "model_kwargs={{'dtype': ...}}": ("dtype", "torch_dtype", "precision"),
    "model_kwargs={{'quantization_config': ...}}": ("quantization_config", "load_in_4bit", "load_in_8bit"),
    "model_kwargs={{'token': ...}}": ("hf_token", "token", "huggingfacehub_api_token", "use_auth_token"),
    "model_kwargs={{{0!r}: ...}}": (
        "revision", "trust_remote_code", "local_files_only", "attn_implementation", "subfolder",
    ),
    "chat_template_kwargs={{{0!r}: ...}}": ("chat_template", "enable_thinking"),
    "base_url= and client_kwargs={{{0!r}: ...}}": (
        "organization", "project", "default_headers", "default_query", "http_client", "http_async_client",
    ),
    "retrieval={{'k': ...}}": ("similarity_top_k", "search_kwargs"),
    "temperature=, top_p=, top_k=, max_tokens=, stop= or seed= themselves": (
        "generate_kwargs", "generation_kwargs", "pipeline_kwargs", "generation_config", "llm_kwargs",
    ),
    "temperature: 0 is greedy, above it answers are sampled": ("do_sample",),
    "from_model(model, tokenizer), or leave it out: the model's own is loaded with it": (
        "tokenizer", "tokenizer_name", "tokenizer_kwargs", "pipeline",
    ),
}  # fmt: skip
_NOTHING = {
    "the window is the model's own, and a prompt over it is refused": (
        "context_window", "n_ctx", "num_ctx", "max_model_len", "max_seq_len", "max_input_tokens",
    ),
    "RASD is a model in this process, without key, address or retries; ChatRASD and RASDLLM take base_url=": (
        "api_key", "api_base", "base_url", "timeout", "max_retries", "client_kwargs",
    ),
    "torch.set_num_threads() sets the threads of a CPU": ("n_threads", "num_threads", "n_batch"),
}  # fmt: skip

_NAMES = {other: name for name, others in _SAME.items() for other in others}
_ADVICE = {
    **{o: f"Use {text.format(o)}." for text, others in _ELSEWHERE.items() for o in others},
    **{o: f"Leave it out: {text}." for text, others in _NOTHING.items() for o in others},
}


def advice(name: str, known: Collection[str]) -> str:
    """Return a sentence on what to use instead of the unknown option ``name``.

    ``known`` are the valid names.
    """
    if _NAMES.get(name) in known:
        return f"Did you mean {_NAMES[name]!r}?"
    # Only for options of a model or a call; other groups of options have names of their own.
    if name in _ADVICE and not {"temperature", "drafter", "dtype"}.isdisjoint(known):
        return _ADVICE[name]
    swapped = [n for n in sorted(known) if sorted(n) == sorted(str(name))]
    near = swapped or difflib.get_close_matches(str(name), sorted(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Valid ones: {', '.join(sorted(known))}."
