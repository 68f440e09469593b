"""RASD: the drafts of several drafters as one tree (arXiv 2503.03434).

Every part proposes and the drafts are merged by common prefix, so that a token that two agree on is verified once.
The budget goes to the nodes with the highest calibrated probabilities. The committed tokens calibrate every proposed
node, verified or not; a part whose drafts cost more time than they save is paused. Parts are asked in turn, until the
draft is sure to go on for some tokens: where an answer copies its prompt, only the first part is asked.

A model among the parts drafts greedily, whatever the sampling distribution: the tree is then a function of the
context, and the token sampled from the target at each node decides, which is exact at any temperature.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace

from torch import Tensor

from rasd_integrations.config import check_value
from rasd_integrations.drafters.base import Drafter, DraftSession, Needs, as_drafter
from rasd_integrations.drafters.calibration import Allowance, Calibration
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

_SURE, _SURE_DEPTH = 0.6, 4  # a path of so many tokens of this probability needs no further part


@dataclass(frozen=True, slots=True)
class _Record:
    """What earlier answers have shown of a part."""

    calibration: Calibration = field(default_factory=Calibration)
    allowance: Allowance | None = None


class _Part:
    """One drafter's session, its calibration and whether it pays."""

    def __init__(self, session: DraftSession, record: _Record) -> None:
        self.session = session
        self.calibration = deepcopy(record.calibration)
        self.allowance = Allowance(record.allowance)
        self.draft = Draft()
        self.node_probs: Sequence[float] = ()
        self.was_asked = False  # for the current draft
        self.has_drafted = False
        self.seconds = 0.0  # spent on the current draft

    def record(self) -> _Record:
        """Return what the next answer should know."""
        return _Record(self.calibration, self.allowance)

    def ask(self, budget: int) -> None:
        """Ask the part for a draft, unless it is paused."""
        self.was_asked = self.allowance.allows
        if self.was_asked:
            started = time.perf_counter()
            self.draft = self.session.propose(budget)
            self.node_probs = self.calibration.node_probs(self.draft)
            self.seconds = time.perf_counter() - started

    @property
    def is_sure(self) -> bool:
        """True if the draft has a likely path: no two children of a node have more than half of its probability."""
        likely = sum(p >= _SURE for p in self.node_probs)
        return likely >= _SURE_DEPTH

    def learn(self, draft: Draft, logits: Tensor) -> None:
        """Forward the target's logits, unless the part is paused."""
        if self.was_asked:
            started = time.perf_counter()
            self.session.learn(draft, logits)
            self.seconds += time.perf_counter() - started

    def observe(self, block: TokenBlock) -> None:
        """Forward what was committed."""
        self.draft, self.node_probs, self.was_asked, self.seconds = Draft(), (), False, 0.0
        self.session.observe(block)

    def account(self, gained: float, step_s: float) -> None:
        """Add what the current draft gained, in steps, less what it took."""
        counts = self.was_asked and self.has_drafted  # the first draft builds what later ones read
        self.allowance.step(gained - self.seconds / step_s if counts else 0.0)
        self.has_drafted |= self.was_asked


class FusedSession(DraftSession):
    """State of several drafters for one answer."""

    def __init__(self, drafter: FusedDrafter, context: DraftContext) -> None:
        """Start every part."""
        self._drafter = drafter
        sessions = [part.start(context) for part in drafter.parts]
        if drafter.model is not None:
            sessions.append(drafter.model.start(replace(context, temperature=0.0)))
        self._parts = [_Part(*pair) for pair in zip(sessions, drafter.records, strict=True)]
        self._model = None if drafter.model is None else self._parts[-1]
        self._step_started = 0.0

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Hand the target to every part."""
        for part in self._parts:
            part.session.attach(target, buffer)

    def propose(self, budget: int) -> Draft:
        """Return the most likely nodes of all parts' drafts together, best first."""
        for part in self._parts:
            part.ask(budget)
            if part.is_sure:
                break
        first = None if self._model is None else _first_tokens_of(self._model, self._drafter.top_k)
        tree = _Tree(self._drafter.name)
        for part in self._parts:
            nodes = tree.add(part, None if part is self._model else first)
            if part is self._model:
                tree.add_siblings(part, nodes, self._drafter.siblings)
        self._step_started = time.perf_counter()
        return tree.best(budget)

    def learn(self, draft: Draft, logits: Tensor) -> None:
        """Hand the logits to the parts that drafted."""
        for part in self._parts:
            part.learn(draft, logits)

    def observe(self, block: TokenBlock) -> None:
        """Calibrate the parts by the last draft and step on."""
        tokens = block.token_ids
        step_s = max(time.perf_counter() - self._step_started, 1e-6)
        right = [(part.calibration.count(part.draft, tokens), part) for part in self._parts]
        known = 0  # right already by a cheaper part: of two that agree, the dearer gains nothing
        for n, part in sorted(right, key=lambda pair: pair[1].seconds):
            part.account(max(n - known, 0) / max(len(tokens), 1), step_s)
            known = max(known, n)
        for part in self._parts:
            part.observe(block)

    def close(self) -> None:
        """Close every part, whatever one of them does; keep what was learned."""
        self._drafter.records = tuple(part.record() for part in self._parts)
        with ExitStack() as stack:
            for part in self._parts:
                stack.callback(part.session.close)


class FusedDrafter(Drafter):
    """Joins drafters: the draft is a tree of the most likely of all their nodes."""

    def __init__(
        self,
        parts: Sequence[Drafter],
        model: Drafter | None = None,
        *,
        name: str = "fused",
        top_k: int = 32,
        siblings: int = 3,
    ) -> None:
        """Join ``parts`` and, if given, a model drafter.

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
            check_value(value >= 0, option, value, "at least 0")
        self.name = name
        self.parts = tuple(map(as_drafter, parts))
        self.model = None if model is None else as_drafter(model)
        self.top_k = top_k
        self.siblings = siblings
        everyone = self.parts if self.model is None else (*self.parts, self.model)
        self.records = tuple(_Record() for _ in everyone)  # of the last answer
        self.needs = Needs(
            prompt=any(drafter.needs.prompt for drafter in everyone),
            hidden=any(drafter.needs.hidden for drafter in everyone),
            timing=True,  # parts are paused by what they cost
        )

    def start(self, context: DraftContext) -> DraftSession:
        """Begin an answer."""
        return FusedSession(self, context)


class _Tree:
    """The union of drafts, each node with its highest probability of all parts."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: dict[tuple[int, int], int] = {}  # by parent and token
        self._probs: list[float] = []
        self._sources: list[str] = []

    def add(self, part: _Part, first: frozenset[int] | None) -> list[int | None]:
        """Merge the part's draft; of its first tokens only those in ``first``, if given.

        Returns:
            The index here of each of its nodes, ``None`` for pruned ones.
        """
        draft = part.draft
        sources = draft.sources or (draft.source or self._name,) * len(draft)
        probs = part.node_probs
        merged: list[int | None] = []
        for node, (parent, token) in enumerate(zip(draft.parent_of, draft.token_ids, strict=True)):
            up = -1 if parent < 0 else merged[parent]
            is_pruned = up is None or (parent < 0 and first is not None and token not in first)
            merged.append(
                None
                if is_pruned or up is None
                else self._put(up, token, probs[node], sources[node])
            )
        return merged

    def add_siblings(self, model: _Part, chain: Sequence[int | None], count: int) -> None:
        """Add the next most likely tokens of the model beside each token of its chain."""
        logits = model.draft.logits
        if logits is None or not count or not chain:
            return
        best = logits[: len(chain)].float().softmax(-1).topk(count + 1)
        up, reached = -1, 1.0
        rows = zip(chain, best.indices.tolist(), best.values.tolist(), strict=True)
        for node, ids, probs in rows:
            for token, prob in zip(ids, probs, strict=True):
                self._put(up, token, reached * prob, model.draft.source or self._name)
            if node is not None:  # the model's own chain is never pruned
                up, reached = node, self._probs[node]

    def best(self, budget: int) -> Draft:
        """Return the ``budget`` most likely nodes; a child is never above its parent."""
        edges = list(self._nodes)
        chosen = sorted(range(len(edges)), key=lambda node: (-self._probs[node], node))[:budget]
        new = {old: i for i, old in enumerate(chosen)} | {-1: -1}
        return Draft(
            token_ids=tuple(edges[i][1] for i in chosen),
            parents=tuple(new[edges[i][0]] for i in chosen),
            source=self._name,
            sources=tuple(self._sources[i] for i in chosen),
            node_probs=tuple(self._probs[i] for i in chosen),
        )

    def _put(self, parent: int, token: int, prob: float, source: str) -> int:
        node = self._nodes.setdefault((parent, token), len(self._probs))
        if node == len(self._probs):
            self._probs.append(prob)
            self._sources.append(source)
        elif prob > self._probs[node]:
            self._probs[node], self._sources[node] = prob, source
        return node


def _first_tokens_of(model: _Part, top_k: int) -> frozenset[int] | None:
    """Return the model's most likely first tokens; ``None`` if it gives no logits."""
    logits = model.draft.logits
    if not top_k or logits is None or not len(logits):
        return None
    return frozenset(logits[0].topk(min(top_k, len(logits[0]))).indices.tolist())
