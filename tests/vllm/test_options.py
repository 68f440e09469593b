"""What a server and a request may set, and what is refused."""

from __future__ import annotations

import pytest

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.vllm.options import MOST_CHUNK_IDS, Asked, Options


def test_options_come_from_additional_config() -> None:
    """What is named under "rasd" is taken, the rest is the default; others' entries are left alone."""
    assert Options.read({"rasd": {"memory_tokens": 7}, "other": 1}) == Options(memory_tokens=7)
    assert Options.read({}) == Options.read(None) == Options()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory_token": 7}, "Unknown option 'memory_token'.*memory_tokens"),
        ({"memory_tokens": -1}, "memory_tokens is -1, but must be at least 0"),
        ({"memory_tokens": True}, "memory_tokens is True"),
        ({"namespaces": 0}, "namespaces is 0, but must be at least 1"),
        ({"least_probability": 1.5}, r"least_probability is 1.5, but must be in \[0, 1\]"),
        ({"least_probability": "high"}, "least_probability is 'high'"),
        (["memory_tokens"], "an object with the proposer's options"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(options: object, said: str) -> None:
    """The message names value and limit."""
    with pytest.raises(ConfigurationError, match=said):
        Options.read({"rasd": options})


@pytest.mark.parametrize(
    "chunks",
    [[1, 2, -1, 3], [1, 2, -1, 3, -1], [-1, 1, 2, -1, -1, 3], [[1, 2], [3]], [[1, 2], [], (3,)]],
)
def test_chunks_come_flat_or_in_lists(chunks: list[object]) -> None:
    """HTTP lets flat lists pass only; empty chunks are left out."""
    assert Asked.read({"rasd_chunks": chunks}, 10).chunks == ((1, 2), (3,))


def test_a_request_that_asks_for_nothing_has_the_defaults() -> None:
    """Other arguments are others'."""
    assert Asked.read(None, 10) == Asked.read({"theirs": 1}, 10) == Asked((), False, "")


@pytest.mark.parametrize(("given", "off"), [(1, True), (True, True), (0, False), (False, False)])
def test_off_is_a_flag_of_json(given: object, off: bool) -> None:
    """HTTP has no booleans there, so 0 and 1 count too."""
    assert Asked.read({"rasd_off": given}, 10).off is off


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ({"rasd_chunk": [1]}, "Unknown option 'rasd_chunk'.*rasd_chunks"),
        ({"rasd_chunks": "1,2"}, "rasd_chunks is '1,2', but must be token ids"),
        ({"rasd_chunks": 5}, "rasd_chunks is '5'"),
        ({"rasd_chunks": [1, "2"]}, "An item of rasd_chunks is '2'"),
        ({"rasd_chunks": [1.0]}, "An item of rasd_chunks is 1.0"),
        ({"rasd_chunks": [True]}, "An item of rasd_chunks is True"),
        ({"rasd_chunks": [-2]}, "An item of rasd_chunks is -2"),
        ({"rasd_chunks": [10]}, "An item of rasd_chunks is 10, .* below 10"),
        ({"rasd_chunks": [[1, [2]]]}, "An item of rasd_chunks is"),
        ({"rasd_chunks": [1] * (MOST_CHUNK_IDS + 1)}, f"{MOST_CHUNK_IDS + 1}, but must be at most"),
        ({"rasd_off": "yes"}, "rasd_off is 'yes'"),
        ({"rasd_off": 2}, "rasd_off is 2"),
        ({"rasd_namespace": 3}, "rasd_namespace is 3, but must be a text"),
    ],
)
def test_a_malformed_request_is_refused(extra: dict[str, object], said: str) -> None:
    """The message names value and limit; an id that the model lacks would end vLLM's server."""
    with pytest.raises(ConfigurationError, match=said):
        Asked.read(extra, 10)
