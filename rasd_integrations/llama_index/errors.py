"""Converts errors that LlamaIndex would take for a model's malformed answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rasd_integrations.errors import ContextOverflowError, DecodingError, RASDError


@contextmanager
def pipeline_errors(in_pipeline: bool) -> Iterator[None]:
    """Raise our `ValueError`s as `RuntimeError`s if a component of LlamaIndex calls the LLM.

    Response synthesizers and extractors take ``ValueError`` and ``TypeError`` for an answer that could not be
    parsed, and go on without it ("Empty Response"). A direct call keeps the types of
    :mod:`rasd_integrations.errors`.

    Raises:
        ContextOverflowError: In a pipeline, it or a subclass.
        DecodingError: In a pipeline, another error of ours that is a ``ValueError``; it is the cause.
    """
    try:
        yield
    except RASDError as error:
        if not in_pipeline:
            raise
        if isinstance(error, ContextOverflowError):
            raise ContextOverflowError(*error.args) from error
        if isinstance(error, ValueError | TypeError):
            raise DecodingError(str(error)) from error
        raise
