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


class RateLimitError(errors.ServerError, langchain.ModelRateLimitError):
    """A model server is busy."""


class AuthenticationError(errors.ServerError, langchain.ModelAuthenticationError):
    """A model server does not know the key."""


class PermissionDeniedError(errors.ServerError, langchain.ModelPermissionDeniedError):
    """A model server does not allow the key to do this."""


class FailedServerError(errors.ServerError, langchain.ModelAPIError):
    """A model server failed."""


class UnreachableServerError(errors.ServerError, langchain.ModelConnectionError):
    """A model server gave no answer, or hung up."""


class ServerTimeoutError(errors.ServerTimeoutError, langchain.ModelTimeoutError):
    """A model server sent nothing for longer than ``timeout`` allows."""


_KINDS: dict[type[Exception], type[Exception]] = {
    errors.PromptTooLongError: ContextOverflowError,
    errors.ConfigurationError: ConfigurationError,
    errors.VocabularyMismatchError: VocabularyMismatchError,
    errors.PromptError: PromptError,
    errors.ModelLoadError: ModelLoadError,
    errors.ServerTimeoutError: ServerTimeoutError,
}
_BY_STATUS: dict[int | None, type[errors.ServerError]] = {
    None: UnreachableServerError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    408: ServerTimeoutError,
    429: RateLimitError,
    504: ServerTimeoutError,
}


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise our errors as LangChain's kinds; errors without one pass unchanged."""
    try:
        yield
    except errors.RASDError as err:
        if type(err) is errors.ServerError:
            raise _BY_STATUS.get(err.status, FailedServerError)(str(err), err.status) from err
        kind = _KINDS.get(type(err))
        if kind is None:
            raise
        raise kind(*err.args) from err
