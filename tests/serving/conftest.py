"""A server over a tiny model, shared by the tests of a file."""

from __future__ import annotations

import pytest
from assistant import standard_model
from served import engines_over, served
from tiny import tiny_llama, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny():
    """Serve a random model with a long window, which seldom ends by itself."""
    model = tiny_llama(max_position_embeddings=8192)
    with served(engines_over(model, tiny_tokenizer()), streams=2, queue=2) as found:
        yield found


@pytest.fixture(scope="module")
def assistant():
    """Serve a model that follows a script: it calls tools and writes JSON."""
    with served(engines_over(*standard_model()), name="assistant") as found:
        yield found
