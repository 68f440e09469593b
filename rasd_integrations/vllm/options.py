"""What the server and a request may set; both are refused by name if they are malformed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rasd_integrations.config import check_value, reject_unknown, updated

OURS = "rasd"  # in vLLM's additional_config
CHUNKS, OFF, NAMESPACE = "rasd_chunks", "rasd_off", "rasd_namespace"  # in a request's extra_args
BETWEEN = -1  # ends a chunk
MOST_CHUNK_IDS = 32_768  # indexing them takes a tenth of a second of vLLM's loop


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the proposer, ``additional_config={"rasd": {...}}``.

    Attributes:
        memory_tokens: Most tokens kept of the answers of a namespace, and most of its fed texts; 0 keeps nothing. They
            are sorted in vLLM's loop: 10 ms for an answer on a busy core, 0.2 s at most at the default.
        namespaces: Most namespaces kept; the one that was used longest ago goes first.
        least_probability: A token is drafted if it is thought to be accepted with this probability. What drafts cost
            vLLM does not tell: raise it where verified tokens are dear (a CPU, a full batch).
    """

    memory_tokens: int = 250_000
    namespaces: int = 64
    least_probability: float = 0.15

    def __post_init__(self) -> None:
        """Check the values."""
        for name, least in (("memory_tokens", 0), ("namespaces", 1)):
            value = getattr(self, name)
            check_value(_is_whole(value) and value >= least, name, value, f"at least {least}")
        share: Any = self.least_probability
        is_number = isinstance(share, int | float) and not isinstance(share, bool)
        check_value(is_number and 0 <= share <= 1, "least_probability", share, "in [0, 1]")

    @classmethod
    def read(cls, additional_config: Any) -> Options:
        """Return those of vLLM's ``additional_config``.

        Raises:
            ConfigurationError: A name is unknown, or a value out of range.
        """
        given = additional_config.get(OURS) if isinstance(additional_config, Mapping) else None
        given = {} if given is None else given
        limit = "an object with the proposer's options"
        check_value(isinstance(given, Mapping), f"additional_config[{OURS!r}]", given, limit)
        return updated(cls(), given, "vLLM's proposer")


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for.

    Attributes:
        chunks: Texts to draft from, as token ids.
        off: No drafts, and the answer is not remembered.
        namespace: Whose memory is drafted from and added to.
    """

    chunks: tuple[tuple[int, ...], ...] = ()
    off: bool = False
    namespace: str = ""

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None, vocabulary: int) -> Asked:
        """Return what ``extra_args`` asks for; names that do not begin with ``rasd_`` are others'.

        Raises:
            ConfigurationError: A name is unknown, or a value malformed; an id outside the ``vocabulary`` would end
                the server.
        """
        given = {n: v for n, v in (extra_args or {}).items() if n.startswith(f"{OURS}_")}
        reject_unknown(given, (CHUNKS, OFF, NAMESPACE), "a request's vllm_xargs")
        off, namespace = given.get(OFF, False), given.get(NAMESPACE, "")
        check_value(off in (False, True), OFF, off, "true or false, or 1 or 0")  # JSON has both
        check_value(isinstance(namespace, str), NAMESPACE, namespace, "a text")
        return cls(_chunks(given.get(CHUNKS, ()), vocabulary), bool(off), namespace)


def _chunks(given: Any, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """Return chunks of flat ids with -1 between them, which is all that HTTP lets pass, or of a list of each."""
    limit = "token ids with -1 between chunks, or a list of ids for each chunk"
    check_value(_is_list(given), CHUNKS, str(given)[:80], limit)
    flat: list[Any] = []
    for item in given:
        flat += [*item, BETWEEN] if _is_list(item) else [item]
    fits = len(flat) <= MOST_CHUNK_IDS
    check_value(fits, f"The length of {CHUNKS}", len(flat), f"at most {MOST_CHUNK_IDS} ids")
    chunks: list[list[int]] = [[]]
    for token in flat:
        fits = _is_whole(token) and BETWEEN <= token < vocabulary
        check_value(fits, f"An item of {CHUNKS}", token, f"{limit}, below {vocabulary}")
        if token == BETWEEN:
            chunks.append([])
        else:
            chunks[-1].append(token)
    return tuple(tuple(chunk) for chunk in chunks if chunk)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
