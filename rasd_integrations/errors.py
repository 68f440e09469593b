"""The errors of the package, one small tree.

::

    RASDError
    ├── ConfigurationError          (also ValueError)    an option, or a combination, that cannot work
    │   └── VocabularyMismatchError                      the drafter's vocabulary cannot be translated
    ├── PromptError                 (also ValueError)    a prompt that cannot be decoded from
    ├── ContextOverflowError        (also RuntimeError)  prompt and answer exceed the target's window
    │   └── PromptTooLongError      (also PromptError)   the same, from a direct call
    ├── ModelLoadError              (also OSError)       weights, tokenizer or template missing or broken
    ├── StorageError                (also OSError)       a file that cannot be written: no room, no right
    ├── RetrievalError              (also RuntimeError)  a store that cannot be used as a chunk source
    ├── DecodingError               (also RuntimeError)  a closed engine, a drafter that knowledge transfer needs
    ├── DeviceMemoryError           (also MemoryError)   a request that does not fit; the engine lives on
    └── MissingDependencyError      (also ImportError)   names the extra to install

Every message names the value, the limit and the next step. Inside LlamaIndex's pipelines errors that are
``ValueError`` here are raised as ``RuntimeError`` (ADR 13): it takes ``ValueError`` for a malformed answer.
"""

from __future__ import annotations


class RASDError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigurationError(RASDError, ValueError):
    """An option, or a combination of options, cannot work."""


class VocabularyMismatchError(ConfigurationError):
    """The drafter's vocabulary is another, and cannot be translated or may not be."""


class PromptError(RASDError, ValueError):
    """The prompt cannot be decoded from."""


class ContextOverflowError(RASDError, RuntimeError):
    """Prompt and answer together exceed the target's window."""

    def __init__(self, prompt_tokens: int, max_tokens: int, window: int) -> None:
        """Keep the sizes; the message says what was asked, what fits and how to shorten it."""
        super().__init__(prompt_tokens, max_tokens, window)  # args: an error is pickled by them
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.window = window

    def __str__(self) -> str:
        excess = self.prompt_tokens + self.max_tokens - self.window
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
    """A file cannot be written: names its path, how much it takes and how much is free."""


class RetrievalError(RASDError, RuntimeError):
    """A store cannot be used as a chunk source."""


class DecodingError(RASDError, RuntimeError):
    """Decoding cannot go on."""


class DeviceMemoryError(RASDError, MemoryError):
    """A request does not fit in the device's memory."""


class MissingDependencyError(RASDError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        """Keep the missing module and the extra that brings it."""
        super().__init__(module, extra)
        self.module = module
        self.extra = extra

    def __str__(self) -> str:
        return f"'{self.module}' is not installed. Install it with: pip install 'rasd-integrations[{self.extra}]'"
