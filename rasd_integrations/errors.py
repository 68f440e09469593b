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
    └── MissingDependencyError      (also ImportError)

Every message names the value, the limit and the next step. LlamaIndex takes ``ValueError`` for a malformed
answer, so inside its pipelines such errors are raised as ``RuntimeError`` (ADR 13).
"""

from __future__ import annotations


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


class MissingDependencyError(RASDError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        """Keep the missing module and the extra that installs it."""
        super().__init__(module, extra)
        self.module = module
        self.extra = extra

    def __str__(self) -> str:
        return f"'{self.module}' is not installed. Install it with: pip install 'rasd-integrations[{self.extra}]'"
