"""Says how many servers a load needs: a simulation of measured steps, prefills and caches.

A server takes turns, as the engine does: a piece of each prefill, then one step of all answers that decode.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import simpy
from typing_extensions import Self

from rasd_integrations.config import check_value
from rasd_integrations.errors import ConfigurationError

Points = tuple[tuple[float, float], ...]
"""Measured pairs (x, y), by x; between them values are interpolated, beyond them they follow the last two."""


def at(points: Points, x: float) -> float:
    """Return y at ``x``."""
    if len(points) == 1:
        return points[0][1]
    right = min(max(bisect_left(points, (x, 0.0)), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    return max(y0 + (y1 - y0) * (x - x0) / (x1 - x0), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What one server's work takes, as ``measure`` finds it.

    Attributes:
        prefill_s: Seconds of the prefill of so many tokens into an empty cache.
        step_s: Seconds of a step of so many answers.
        step_s_per_token: Further seconds of a step for each token of an answer's context.
        alone_tokens: Tokens a step of an answer that decodes alone, with drafts.
        alone_s: Seconds of a step with drafts; ``None``: of one without.
        piece: Tokens of a prefill that run before others have a turn.
        overhead_s: Seconds of a request besides its steps.
    """

    prefill_s: Points
    step_s: Points
    step_s_per_token: float = 0.0
    alone_tokens: float = 1.0
    alone_s: float | None = None
    piece: int = 512
    overhead_s: float = 0.0

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the costs in a file.

        Raises:
            ConfigurationError: It cannot be read, or lacks a cost.
        """
        try:
            given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["costs"]
            points = {
                n: tuple((float(x), float(y)) for x, y in given[n]) for n in ("prefill_s", "step_s")
            }
            return cls(**{**given, **points})
        except (OSError, ValueError, KeyError, TypeError) as err:
            msg = f"The costs in {str(path)!r} cannot be read: {err!r}. Measure them: rasd plan FILE --measure MODEL"
            raise ConfigurationError(msg) from err

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Who asks what.

    Attributes:
        rate: Requests a second, arriving at random (Poisson).
        documents: Number of documents that are asked about.
        skew: Exponent of Zipf's law of their popularity; 0: all alike.
        document_tokens: Tokens of a document, which begins the prompt.
        question_tokens: Tokens after it.
        answer_tokens: Tokens of an answer.
        seconds: Simulated time.
    """

    rate: float
    documents: int = 50
    skew: float = 1.0
    document_tokens: int = 4000
    question_tokens: int = 60
    answer_tokens: int = 60
    seconds: float = 1800.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least in (("rate", 0), ("documents", 0), ("answer_tokens", 0), ("seconds", 0)):
            value = getattr(self, name)
            check_value(value > least, name, value, f"above {least}")
        for name in ("skew", "document_tokens", "question_tokens"):
            value = getattr(self, name)
            check_value(value >= 0, name, value, "at least 0")

    def arrivals(self, seed: int) -> list[Arrival]:
        """Draw requests."""
        draw = random.Random(seed)
        weights = [(n + 1) ** -self.skew for n in range(self.documents)]
        out, now = [], draw.expovariate(self.rate)
        while now < self.seconds:
            (document,) = draw.choices(range(self.documents), weights)
            sizes = self.document_tokens, self.question_tokens, self.answer_tokens
            out.append(Arrival(now, document, *sizes))
            now += draw.expovariate(self.rate)
        return out


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it comes, about which document, and its tokens."""

    at: float
    document: int
    document_tokens: int
    question_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The servers.

    Attributes:
        replicas: How many.
        affinity: All questions on one document go to one server; else each to the next.
        cache_tokens: Tokens whose keys and values a server keeps.
        streams: Answers that a server decodes at a time.
        queue: Answers that wait; more are refused.
    """

    replicas: int
    affinity: bool = True
    cache_tokens: int = 200_000
    streams: int = 8
    queue: int = 32


@dataclass(slots=True)
class Served:
    """What became of a request: seconds to its first token, and for each further one."""

    arrival: Arrival
    first_s: float = 0.0
    per_token_s: float = 0.0
    refused: bool = False
    known: bool = False


@dataclass(slots=True)
class _Answer:
    served: Served
    left: float
    known: int
    read: int = 0
    made: float = 0.0
    first_at: float = 0.0

    @property
    def prompt(self) -> int:
        asked = self.served.arrival
        return asked.document_tokens + asked.question_tokens


@dataclass(slots=True)
class _Server:
    """One server: its queue, its running answers and its cache, with the process that takes turns."""

    env: simpy.Environment
    costs: Costs
    fleet: Fleet
    waiting: deque[Served] = field(default_factory=deque)
    reading: list[_Answer] = field(default_factory=list)
    decoding: list[_Answer] = field(default_factory=list)
    cache: OrderedDict[int, int] = field(default_factory=OrderedDict)
    wake: simpy.Event | None = None
    busy_s: float = 0.0

    @property
    def load(self) -> int:
        return len(self.waiting) + len(self.reading) + len(self.decoding)

    def take(self, served: Served) -> None:
        if self.load >= self.fleet.streams + self.fleet.queue:
            served.refused = True
            return
        self.waiting.append(served)
        if self.wake is not None and not self.wake.triggered:
            self.wake.succeed()

    def run(self) -> Generator[simpy.Event, None, None]:
        while True:
            self._admit()
            if not self.reading and not self.decoding:
                self.wake = self.env.event()
                yield self.wake
                continue
            for answer in list(self.reading):
                yield self._spend(self._piece(answer))
                self._read(answer)
            if self.decoding:
                yield self._spend(self._step_s())
                self._step()

    def _spend(self, seconds: float) -> simpy.Event:
        self.busy_s += seconds
        return self.env.timeout(seconds)

    def _admit(self) -> None:
        while self.waiting and len(self.reading) + len(self.decoding) < self.fleet.streams:
            served = self.waiting.popleft()
            asked = served.arrival
            known = self.cache.get(asked.document, 0)
            served.known = known > 0
            if known:
                self.cache.move_to_end(asked.document)
            self.reading.append(_Answer(served, asked.answer_tokens, known, read=known))

    def _piece(self, answer: _Answer) -> float:
        ends = min(answer.read + self.costs.piece, answer.prompt)
        seconds = at(self.costs.prefill_s, ends) - at(self.costs.prefill_s, answer.read)
        step = at(self.costs.step_s, 1) + self.costs.step_s_per_token * answer.read
        overhead = self.costs.overhead_s if answer.read == answer.known else 0.0
        return max(seconds, step) + overhead  # a few tokens read all the weights, too

    def _read(self, answer: _Answer) -> None:
        answer.read = min(answer.read + self.costs.piece, answer.prompt)
        if answer.read < answer.prompt:
            return
        self.reading.remove(answer)  # the prompt's last row gives the first token
        answer.first_at = self.env.now
        answer.served.first_s = self.env.now - answer.served.arrival.at
        self._keep(answer.served.arrival)
        self._made(answer, 1.0)

    def _keep(self, asked: Arrival) -> None:
        if not asked.document_tokens:
            return
        self.cache[asked.document] = asked.document_tokens
        self.cache.move_to_end(asked.document)
        while sum(self.cache.values()) > self.fleet.cache_tokens and len(self.cache) > 1:
            self.cache.popitem(last=False)

    def _step_s(self) -> float:
        rows, costs = len(self.decoding), self.costs
        context = sum(a.prompt for a in self.decoding) * costs.step_s_per_token
        own = at(costs.step_s, rows)
        if rows == 1 and costs.alone_tokens > 1 and costs.alone_s is not None:
            own = costs.alone_s
        return own + context

    def _step(self) -> None:
        tokens = self.costs.alone_tokens if len(self.decoding) == 1 else 1.0
        for answer in list(self.decoding):
            self._made(answer, tokens)

    def _made(self, answer: _Answer, tokens: float) -> None:
        answer.made += tokens
        whole = answer.served.arrival.answer_tokens
        if answer.made < whole:
            if answer not in self.decoding:
                self.decoding.append(answer)
            return
        if answer in self.decoding:
            self.decoding.remove(answer)
        further = max(whole - 1, 1)
        answer.served.per_token_s = (self.env.now - answer.first_at) / further


def simulate(arrivals: Sequence[Arrival], costs: Costs, fleet: Fleet) -> list[Served]:
    """Return what becomes of the requests, in their order."""
    env = simpy.Environment()
    servers = [_Server(env, costs, fleet) for _ in range(fleet.replicas)]
    for server in servers:
        env.process(server.run())
    found = [Served(arrival) for arrival in arrivals]

    def arrive() -> Generator[simpy.Event, None, None]:
        for number, served in enumerate(found):
            yield env.timeout(served.arrival.at - env.now)
            chosen = served.arrival.document if fleet.affinity else number
            servers[chosen % fleet.replicas].take(served)

    env.process(arrive())
    env.run(until=arrivals[-1].at + 3600.0 if arrivals else 1.0)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile of ``values``; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def summary(found: Sequence[Served]) -> Mapping[str, float]:
    """Return percentiles in seconds, and the shares of refused requests and of known documents."""
    served = [one for one in found if not one.refused]
    first, each = [one.first_s for one in served], [one.per_token_s for one in served]
    out = {f"first p{p}": percentile(first, p / 100) for p in (50, 99)}
    out |= {f"token p{p}": percentile(each, p / 100) for p in (50, 99)}
    many = max(len(found), 1)
    out["refused"] = sum(one.refused for one in found) / many
    return out | {"known": sum(one.known for one in served) / max(len(served), 1)}


def plan(
    load: Load,
    costs: Costs,
    fleet: Fleet,
    *,
    most: int,
    first_s: float,
    token_s: float,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Return a row for each number of servers, up to the first that keeps the limits at p99.

    Each row has the summary with affinity, without it, and without drafts where there are some; and whether the first
    of these keeps the limits.

    Args:
        load: Who asks.
        costs: Of a server.
        fleet: The servers; ``replicas`` and ``affinity`` are varied.
        most: Servers that are tried.
        first_s: Limit of the first token, at p99.
        token_s: Limit of each further one, at p99.
        seed: Of the arrivals.
    """
    arrivals, rows = load.arrivals(seed), list[dict[str, Any]]()
    plain = replace(costs, alone_tokens=1.0)
    for replicas in range(1, most + 1):
        own = replace(fleet, replicas=replicas)
        kinds = {"affinity": (costs, own), "no affinity": (costs, replace(own, affinity=False))}
        kinds |= {"no drafts": (plain, own)} if costs.alone_tokens > 1 else {}
        row = {name: summary(simulate(arrivals, *kind)) for name, kind in kinds.items()}
        best = row["affinity"]
        keeps = best["first p99"] <= first_s and best["token p99"] <= token_s
        keeps = keeps and not best["refused"]
        rows.append({"replicas": replicas, **row, "keeps": keeps})
        if keeps:
            break
    return rows
