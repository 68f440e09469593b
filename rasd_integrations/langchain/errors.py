"""Our errors as subclasses of LangChain's, which its middlewares handle.

Retries skip a :class:`~langchain_core.exceptions.ModelError` that cannot succeed; summarisation shortens the
conversation after a ``ContextOverflowError``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from langchain_core import exceptions as langchain

from rasd_integrations import errors


class ContextOverflowError(errors.PromptTooLongError, langchain.ContextOverflowError):
    """Prompt and answer together exceed the target's window."""


class ConfigurationError(errors.ConfigurationError, langchain.ModelInvalidRequestError):
    """An option of a call, or a combination, cannot work."""


class VocabularyMismatchError(errors.VocabularyMismatchError, langchain.ModelInvalidRequestError):
    """The drafter's vocabulary is another, and cannot be translated or may not be."""


class PromptError(errors.PromptError, langchain.ModelInvalidRequestError):
    """The prompt cannot be decoded from."""


class ModelLoadError(errors.ModelLoadError, langchain.ModelNotFoundError):
    """A model, tokenizer or chat template is missing or broken."""


_KINDS: dict[type[Exception], type[Exception]] = {
    errors.PromptTooLongError: ContextOverflowError,
    errors.ConfigurationError: ConfigurationError,
    errors.VocabularyMismatchError: VocabularyMismatchError,
    errors.PromptError: PromptError,
    errors.ModelLoadError: ModelLoadError,
}


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise our errors as LangChain's kinds; errors without one pass unchanged."""
    try:
        yield
    except errors.RASDError as err:
        kind = _KINDS.get(type(err))
        if kind is None:
            raise
        raise kind(*err.args) from err
