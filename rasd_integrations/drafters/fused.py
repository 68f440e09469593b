"""RASD: the drafts of several drafters as one tree (arXiv 2503.03434).

Every part proposes; the tries are merged by longest common prefix, so that a token on which two agree is
verified once. The nodes of the budget go to the paths that are most likely to be accepted. What a part says of
its own nodes (:attr:`Draft.node_probs`) is set right by what became of its earlier ones: the committed tokens
judge each proposed node, whether it was verified or not. A part whose drafts gain less time than they take is
asked more rarely.

A model among the parts drafts greedily, whatever the sampling distribution: the tree is then a function of the
context, and the token sampled from the target at each node decides, which is exact at any temperature.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from torch import Tensor

from rasd_integrations.drafters.base import Drafter, DraftSession, Needs, as_drafter
from rasd_integrations.drafters.calibration import SIZES, size_of
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

_CARRIED = 0.5  # share of the judged nodes that counts in the next answer
_FAITH = 4.0  # a part's own estimate weighs as much as so many judged nodes
_UNSAID = 0.5  # assumed of each token of a draft without an estimate
# Text is copied in bursts: a part that has nothing for ten steps may have all of the next ten.
_MEMORY = 0.97
_TRIAL = 16  # drafts of a part before it is judged
_CHEAP = 0.02  # a part that takes less than this share of a step is always asked
_REST = 16  # steps that a part which does not pay is left alone at least
_LONGEST_REST = 256
_TRYING = 0.01  # of the time may go into trying it again


_NOTHING = (0.0,) * SIZES


@dataclass(frozen=True, slots=True)
class _Record:
    """What earlier answers have shown of a part: the machine and the kind of text stay the same."""

    hits: tuple[float, ...] = _NOTHING
    tries: tuple[float, ...] = _NOTHING
    asked: int = 0
    rest: int = 0
    seconds: float = 0.0
    gained: float = 0.0


class _Part:
    """One drafter at work, and what has been seen of it."""

    def __init__(self, session: DraftSession, record: _Record) -> None:
        self.session = session
        self.draft = Draft()
        self.node_probs: tuple[float, ...] = ()  # what it said itself
        self.answered = False  # whether it was asked for the draft under way
        self.spent = 0.0  # seconds on that draft so far
        self.hits = [_CARRIED * n for n in record.hits]
        self.tries = [_CARRIED * n for n in record.tries]
        self.asked = record.asked
        self.rest = record.rest  # steps that it is left alone
        self.seconds = record.seconds  # of a draft, running average
        self.gained = record.gained  # tokens of a draft that no cheaper part had, running average

    def record(self) -> _Record:
        """Return what the next answer should know."""
        return _Record(
            tuple(self.hits), tuple(self.tries), self.asked, self.rest, self.seconds, self.gained
        )

    def ask(self, budget: int) -> None:
        """Take the next draft, or none while the part rests."""
        if self.rest:
            return
        started = time.perf_counter()
        self.draft = self.session.propose(budget)
        self.node_probs = self.draft.node_probs or _unsaid(self.draft)
        self.asked += 1
        self.spent = time.perf_counter() - started
        self.answered = True

    def learn(self, draft: Draft, logits: Tensor) -> None:
        """Pass on what the target thought, unless the part rests."""
        if self.answered:
            started = time.perf_counter()
            self.session.learn(draft, logits)
            self.spent += time.perf_counter() - started

    def expected(self, prob: float) -> float:
        """Return the calibrated acceptance probability of a node that the part gives ``prob``."""
        b = size_of(prob)
        return (self.hits[b] + _FAITH * prob) / (self.tries[b] + _FAITH)

    def judge(self, tokens: Sequence[int]) -> int:
        """Learn from what was committed instead; return how many tokens the draft had right."""
        path = _path(self.draft, tokens)
        on_path = set(path)
        # What is drafted behind the last committed token, nobody can judge yet.
        unknown = {path[-1]} if path and len(path) == len(tokens) else set()
        for node, (parent, prob) in enumerate(
            zip(self.draft.parent_of, self.node_probs, strict=True)
        ):
            if parent in unknown:
                unknown.add(node)
                continue
            b = size_of(prob)
            self.tries[b] += 1
            self.hits[b] += node in on_path
        return len(path)

    def account(self, gained: int, seconds_per_token: float, step_s: float) -> None:
        """Rest if the last drafts were not worth their time."""
        self._average("gained", gained)
        self._average("seconds", self.spent)
        dear = self.seconds > _CHEAP * step_s
        if dear and self.asked >= _TRIAL and self.gained * seconds_per_token < self.seconds:
            self.rest = int(min(max(self.seconds / (_TRYING * step_s), _REST), _LONGEST_REST))

    def _average(self, name: str, value: float) -> None:
        weight = max(1 - _MEMORY, 1 / self.asked)
        setattr(self, name, getattr(self, name) + weight * (value - getattr(self, name)))


class FusedSession(DraftSession):
    """Several drafters at work on one answer."""

    def __init__(self, drafter: FusedDrafter, context: DraftContext) -> None:
        """Start every part."""
        self._drafter = drafter
        sessions = [part.start(context) for part in drafter.parts]
        if drafter.model is not None:
            sessions.append(drafter.model.start(replace(context, temperature=0.0)))
        self._parts = [_Part(*pair) for pair in zip(sessions, drafter.records, strict=True)]
        self._model = None if drafter.model is None else self._parts[-1]
        self._step_began = 0.0
        self._draft_s = 0.0

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Hand the target to the parts that read it."""
        for part in self._parts:
            part.session.attach(target, buffer)

    def propose(self, budget: int) -> Draft:
        """Return the most likely nodes of all parts' drafts together, best first."""
        started = time.perf_counter()
        for part in self._parts:
            part.ask(budget)
        first = None if self._model is None else _first_tokens_of(self._model, self._drafter.top_k)
        tree = _Tree(self._drafter.name)
        for part in self._parts:
            nodes = tree.add(part, None if part is self._model else first)
            if part is self._model:
                tree.add_siblings(part, nodes, self._drafter.siblings)
        self._step_began = time.perf_counter()
        self._draft_s = self._step_began - started
        return tree.best(budget)

    def learn(self, draft: Draft, logits: Tensor) -> None:
        """Hand the logits to the parts that learn from them."""
        for part in self._parts:
            part.learn(draft, logits)

    def observe(self, block: TokenBlock) -> None:
        """Judge the last drafts and step on."""
        step_s = time.perf_counter() - self._step_began
        per_token = (step_s + self._draft_s) / max(len(block.token_ids), 1)
        for part in self._parts:
            part.rest = max(part.rest - 1, 0)
        right = [part.judge(block.token_ids) for part in self._parts]
        known = 0  # what the cheaper parts had right: of two that say the same, the dearer gains nothing
        for n, part in sorted(zip(right, self._parts, strict=True), key=lambda p: p[1].spent):
            if part.answered:
                part.account(max(n - known, 0), per_token, step_s)
                known = max(known, n)
        for part in self._parts:
            part.draft, part.node_probs, part.answered = Draft(), (), False
            part.session.observe(block)

    def close(self) -> None:
        """Close every part, whatever one of them does, and leave what was learned to the next answer."""
        self._drafter.records = tuple(part.record() for part in self._parts)
        with ExitStack() as stack:
            for part in self._parts:
                stack.callback(part.session.close)


class FusedDrafter(Drafter):
    """Joins drafters into one whose draft is a tree of the most likely of all their nodes."""

    def __init__(
        self,
        parts: Sequence[Drafter],
        model: Drafter | None = None,
        *,
        name: str = "fused",
        top_k: int = 32,
        siblings: int = 3,
    ) -> None:
        """Join ``parts`` and, where given, a model drafter.

        Args:
            parts: Drafters of deterministic drafts.
            model: A drafter of chains with logits (:class:`ModelDrafter`, :class:`CascadeDrafter`).
            name: In the statistics, for nodes whose part gives no name.
            top_k: Retrieved continuations whose first token is not among the model's so many most likely
                are pruned (RASD); 0 prunes none.
            siblings: Of each of the model's tokens, how many next most likely ones are drafted beside it.

        Raises:
            ConfigurationError: No part, or a negative number.
        """
        if not parts and model is None:
            msg = "A fused drafter needs at least one part. Give it drafters, or use drafter=None."
            raise ConfigurationError(msg)
        for option, value in (("top_k", top_k), ("siblings", siblings)):
            if value < 0:
                msg = f"{option} is {value}, but must be at least 0."
                raise ConfigurationError(msg)
        self.name = name
        self.parts = tuple(map(as_drafter, parts))
        self.model = None if model is None else as_drafter(model)
        self.top_k = top_k
        self.siblings = siblings
        everyone = self.parts if self.model is None else (*self.parts, self.model)
        self.records: tuple[_Record, ...] = (_Record(),) * len(everyone)
        self.gives_logits = self.model is not None and self.model.gives_logits
        self.needs = Needs(
            prompt=any(drafter.needs.prompt for drafter in everyone),
            hidden=any(drafter.needs.hidden for drafter in everyone),
            timing=True,  # parts are paused by what they cost
        )

    def start(self, context: DraftContext) -> DraftSession:
        """Begin an answer; under a distribution that leans towards the drafter, the model alone drafts."""
        if context.wants_logits and self.model is not None:
            return self.model.start(context)
        return FusedSession(self, context)


class _Tree:
    """The union of tries, each node with the best estimate of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._places: dict[tuple[int, int], int] = {}  # parent and token to node
        self._token_ids: list[int] = []
        self._parents: list[int] = []
        self._node_probs: list[float] = []
        self._sources: list[str] = []

    def add(self, part: _Part, first: frozenset[int] | None) -> list[int | None]:
        """Merge the part's draft; of its first tokens only those in ``first``, where given.

        Returns:
            The place of each of its nodes, ``None`` for pruned ones.
        """
        draft = part.draft
        sources = draft.sources or (draft.source or self._name,) * len(draft)
        mine: list[int | None] = []  # of the draft's nodes
        for node, parent in enumerate(draft.parent_of):
            token = draft.token_ids[node]
            up = -1 if parent < 0 else mine[parent]
            if up is None or (parent < 0 and first is not None and token not in first):
                mine.append(None)
                continue
            prob = part.expected(part.node_probs[node])
            mine.append(self._put(up, token, prob, sources[node]))
        return mine

    def add_siblings(self, model: _Part, chain: Sequence[int | None], count: int) -> None:
        """Put beside each token of the model's chain the next most likely of its distribution."""
        logits = model.draft.logits
        if logits is None or not count or not chain:
            return
        best = logits[: len(chain)].float().softmax(-1).topk(count + 1)
        up, reached = -1, 1.0
        for node, ids, probs in zip(
            chain, best.indices.tolist(), best.values.tolist(), strict=True
        ):
            for token, prob in zip(ids, probs, strict=True):
                self._put(up, token, reached * prob, model.draft.source or self._name)
            if node is not None:  # the model's own chain is never pruned
                up, reached = node, self._node_probs[node]

    def best(self, budget: int) -> Draft:
        """Return the ``budget`` most likely nodes; parents stand before their children."""
        node_probs = self._node_probs
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                node_probs[node] = min(node_probs[node], node_probs[parent])
        chosen = sorted(range(len(node_probs)), key=lambda node: (-node_probs[node], node))[:budget]
        new = {old: i for i, old in enumerate(chosen)} | {-1: -1}
        return Draft(
            token_ids=tuple(self._token_ids[i] for i in chosen),
            parents=tuple(new[self._parents[i]] for i in chosen),
            source=self._name,
            sources=tuple(self._sources[i] for i in chosen),
            node_probs=tuple(node_probs[i] for i in chosen),
        )

    def _put(self, parent: int, token: int, prob: float, source: str) -> int:
        node = self._places.setdefault((parent, token), len(self._token_ids))
        if node == len(self._token_ids):
            self._token_ids.append(token)
            self._parents.append(parent)
            self._node_probs.append(prob)
            self._sources.append(source)
        elif prob > self._node_probs[node]:
            self._node_probs[node], self._sources[node] = prob, source
        return node


def _first_tokens_of(model: _Part, top_k: int) -> frozenset[int] | None:
    """Return the model's most likely first tokens; ``None`` where it has no estimate."""
    logits = model.draft.logits
    if not top_k or logits is None or not len(logits):
        return None
    return frozenset(logits[0].topk(min(top_k, len(logits[0]))).indices.tolist())


def _unsaid(draft: Draft) -> tuple[float, ...]:
    """Return the estimate of a draft that has none."""
    node_probs: list[float] = []
    for parent in draft.parent_of:
        node_probs.append(_UNSAID * (1.0 if parent < 0 else node_probs[parent]))
    return tuple(node_probs)


def _path(draft: Draft, tokens: Sequence[int]) -> list[int]:
    """Return the nodes that spell the head of ``tokens``."""
    children = {
        (p, t): i for i, (p, t) in enumerate(zip(draft.parent_of, draft.token_ids, strict=True))
    }
    path: list[int] = []
    node: int | None = -1
    for token in tokens:
        node = children.get((node if node is not None else -1, token))
        if node is None:
            break
        path.append(node)
    return path
