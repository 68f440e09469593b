"""The tree of errors: their types, their words, and that they cross process borders."""

from __future__ import annotations

import inspect
import pickle

import pytest

from rasd_integrations import errors

BUILTIN = (ValueError, OSError, RuntimeError, MemoryError, ImportError)
KINDS = [e for _, e in inspect.getmembers(errors, inspect.isclass) if e is not errors.RASDError]
ARGUMENTS = {
    errors.ContextOverflowError: (8000, 512, 8192),
    errors.PromptTooLongError: (8000, 512, 8192),
    errors.MissingDependencyError: ("faiss", "faiss"),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_ours_and_a_built_in_one_and_can_be_pickled(kind):
    """Each is also the built-in type a caller would catch; worker processes send errors to their parent."""
    error = kind(*ARGUMENTS.get(kind, ("it went wrong",)))
    again = pickle.loads(pickle.dumps(error))

    assert isinstance(error, errors.RASDError)
    assert isinstance(error, BUILTIN)
    assert (kind, str(error), vars(error)) == (type(again), str(again), vars(again))


def test_a_prompt_that_is_too_long_is_named_with_its_sizes():
    """The message has the sizes, the limit and the excess."""
    error = errors.PromptTooLongError(8000, 512, 8192)

    assert "8000" in str(error)
    assert "window is 8192: 320 too many" in str(error)
