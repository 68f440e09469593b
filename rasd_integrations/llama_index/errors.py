"""Converts errors that LlamaIndex would take for a model's malformed answer."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from rasd_integrations.errors import ContextOverflowError, DecodingError, RASDError


@dataclass(frozen=True, slots=True)
class PipelineErrors:
    """A reentrant context that raises our `ValueError`s as `RuntimeError`s inside a LlamaIndex pipeline.

    Response synthesizers and extractors take ``ValueError`` and ``TypeError`` for an answer that could not be
    parsed, and go on without it ("Empty Response"). A direct call keeps the types of
    :mod:`rasd_integrations.errors`.

    Attributes:
        in_pipeline: The LLM is called by a component of LlamaIndex.
    """

    in_pipeline: bool

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raise ``error`` as a type that reaches the caller.

        Raises:
            ContextOverflowError: It is one.
            DecodingError: Another error of ours that is a ``ValueError``; it is the cause.
        """
        if not (self.in_pipeline and isinstance(error, RASDError)):
            return
        if isinstance(error, ContextOverflowError):
            raise ContextOverflowError(*error.args) from error
        if isinstance(error, ValueError | TypeError):
            raise DecodingError(str(error)) from error
