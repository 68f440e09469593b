"""What an answer carries: decoding counters, rates that are derived from them, and its quotes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

_OPTIONAL = (
    "off_reason", "tv_bound", "transfer_off_reason", "route", "route_reason", "candidates", "rewards", "logprob",
    "question_source", "chunk_source",
)  # fmt: skip


def plain_json(metadata: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a copy of the entries that JSON can hold; the others are left out."""
    out: dict[str, Any] = {}
    for key, value in metadata.items():
        with suppress(TypeError, ValueError, RecursionError):
            out[str(key)] = json.loads(json.dumps(value, allow_nan=False))
    return out


@dataclass(frozen=True, slots=True)
class Quote:
    """A span of an answer that is word for word in a chunk.

    Attributes:
        start: Of its first character in the answer's text.
        end: Behind its last.
        text: What is quoted.
        chunk_id: The store's id of the chunk, if it has one.
        chunk_start: Start in the chunk's text, as stored.
        metadata: The chunk's.
    """

    start: int
    end: int
    text: str
    chunk_id: str | None = None
    chunk_start: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; entries of the metadata that have none are left out."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        out["metadata"] = plain_json(self.metadata)
        return out


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of several answers.

    Attributes:
        text: What it says.
        own: Mean log-probability of its tokens, given the chunks that it was made from.
        given_all: The same, given the whole prompt.
    """

    text: str
    own: float
    given_all: float

    @property
    def score(self) -> float:
        """The sum of both."""
        return self.own + self.given_all


@dataclass(frozen=True, slots=True)
class Reward:
    """What a scorer said of a step.

    Attributes:
        value: The number.
        kept: The teacher's step was kept; else the target wrote another.
    """

    value: float
    kept: bool


@dataclass(slots=True)
class DrafterStats:
    """What one drafter proposed and how much of it the target accepted."""

    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class DecodingStats:
    """Counters of one answer, or the sum of many; seconds are wall-clock."""

    mode: str = "lossless"
    drafters: dict[str, DrafterStats] = field(default_factory=dict)
    target_steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    reasoning_tokens: int = 0
    drafter_prompt_tokens: int = 0
    question_source: str | None = None
    chunk_source: str | None = None
    num_chunks: int = 0
    off_reason: str | None = None
    faults: tuple[str, ...] = ()
    closed_fields: tuple[str, ...] = ()
    omitted_tokens: int = 0
    quotes: tuple[Quote, ...] = ()
    tv_bound: float | None = None
    transfer_off_reason: str | None = None
    route: str | None = None
    route_reason: str | None = None
    candidates: tuple[Candidate, ...] = ()
    rewards: tuple[Reward, ...] = ()
    logprob: float | None = None
    retrieve_s: float = 0.0
    prefill_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0

    @property
    def drafted(self) -> int:
        """Draft tokens that the target verified."""
        return sum(d.drafted for d in self.drafters.values())

    @property
    def accepted(self) -> int:
        """Draft tokens that the target accepted."""
        return sum(d.accepted for d in self.drafters.values())

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted; 0 if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target step with the bonus token, as in vLLM: 1 + accepted / steps."""
        return 1 + self.accepted / self.target_steps if self.target_steps else 0.0

    @property
    def changed_share(self) -> float:
        """Expected share of tokens that the target alone would have chosen otherwise; 0 if lossless."""
        return (self.tv_bound or 0.0) / self.generated_tokens if self.generated_tokens else 0.0

    def count(self, source: str, drafted: int, accepted: int) -> None:
        """Add one verified draft of the drafter ``source``."""
        entry = self.drafters.setdefault(source, DrafterStats())
        entry.drafted += drafted
        entry.accepted += accepted

    def add(self, other: DecodingStats) -> None:
        """Add the counters of ``other``; other fields take its values."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if f.name == "drafters":
                for name, entry in theirs.items():
                    self.count(name, entry.drafted, entry.accepted)
            elif f.name in ("tv_bound", "logprob"):
                setattr(self, f.name, theirs if mine is None else mine + (theirs or 0.0))
            elif isinstance(mine, int | float) and not isinstance(mine, bool):
                setattr(self, f.name, mine + theirs)
            else:
                setattr(self, f.name, theirs)

    def add_work(self, other: DecodingStats) -> None:
        """Add what an answer cost that was made for this one and not returned: prompts, steps, drafts, seconds."""
        kept = self.generated_tokens, self.reasoning_tokens
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if type(mine) in (int, float) and type(theirs) in (int, float):
                setattr(self, f.name, mine + theirs)
        self.generated_tokens, self.reasoning_tokens = kept
        for name, entry in other.drafters.items():
            self.count(name, entry.drafted, entry.accepted)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> DecodingStats:
        """Return what :meth:`as_dict` wrote; names of later versions are left out."""
        known = {f.name: given[f.name] for f in fields(cls) if f.name in given}
        parts: tuple[tuple[str, type[Any]], ...] = (
            ("quotes", Quote), ("rewards", Reward), ("candidates", Candidate),
        )  # fmt: skip
        for name, kind in parts:
            known[name] = tuple(_record(kind, entry) for entry in known.get(name, ()))
        for name in ("faults", "closed_fields"):
            known[name] = tuple(known.get(name, ()))
        drafters = known.get("drafters", {})
        return cls(**known | {"drafters": {n: DrafterStats(**d) for n, d in drafters.items()}})

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values, for ``response_metadata["rasd"]``."""
        out: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        out["drafters"] = {
            name: {"drafted": d.drafted, "accepted": d.accepted}
            for name, d in self.drafters.items()
        }
        out["faults"] = list(self.faults)
        out["closed_fields"] = list(self.closed_fields)
        out["quotes"] = [quote.as_dict() for quote in self.quotes]
        out["rewards"] = [asdict(reward) for reward in self.rewards]
        out["candidates"] = [asdict(c) | {"score": c.score} for c in self.candidates]
        out["acceptance_rate"] = self.acceptance_rate
        out["mean_acceptance_length"] = self.mean_acceptance_length
        if self.tv_bound is not None:
            out["changed_share"] = self.changed_share
        for optional in _OPTIONAL:
            if out[optional] is None or out[optional] == []:
                del out[optional]
        return out


def _record(kind: type[Any], given: Mapping[str, Any]) -> Any:
    return kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given})
