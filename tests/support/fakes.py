"""Drafters that follow a script, for the losslessness matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rasd_integrations.drafters.base import Drafter, DraftSession
from rasd_integrations.types import Draft, DraftContext, TokenBlock

Propose = Callable[[list[int], int], Draft]
"""Takes the committed answer and the budget."""


class ScriptedDrafter(Drafter):
    """Proposes what a function of the committed answer says."""

    name = "scripted"

    def __init__(self, propose: Propose) -> None:
        self.script = propose
        self.sessions: list[ScriptedSession] = []

    def start(self, context: DraftContext) -> ScriptedSession:
        self.sessions.append(ScriptedSession(self.script, context))
        return self.sessions[-1]


class ScriptedSession(DraftSession):
    """One answer of a scripted drafter."""

    def __init__(self, propose: Propose, context: DraftContext) -> None:
        self.script, self.context = propose, context
        self.answer: list[int] = []
        self.budgets: list[int] = []
        self.closed = False

    def propose(self, budget: int) -> Draft:
        self.budgets.append(budget)
        return self.script(self.answer, budget)

    def observe(self, block: TokenBlock) -> None:
        self.answer.extend(block.token_ids)

    def close(self) -> None:
        self.closed = True


def oracle(truth: Sequence[int]) -> Propose:
    """Propose exactly what the target will say."""
    return lambda answer, budget: Draft(
        tuple(truth[len(answer) : len(answer) + budget]), source="s"
    )


def always_wrong(truth: Sequence[int], vocab: int) -> Propose:
    """Propose tokens that the target will not say."""

    def propose(answer: list[int], budget: int) -> Draft:
        right = [*truth[len(answer) :], *([0] * budget)]
        return Draft(tuple((t + 1) % vocab for t in right[:budget]), source="s")

    return propose


def empty() -> Propose:
    """Propose nothing."""
    return lambda answer, budget: Draft(source="s")


def too_long(truth: Sequence[int]) -> Propose:
    """Propose more than the budget allows."""
    return lambda answer, budget: Draft(
        tuple([*truth[len(answer) :], *([1] * 64)][: budget + 40]), source="s"
    )


def random_tokens(vocab: int, seed: int = 0) -> Propose:
    """Propose random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return lambda answer, budget: Draft(
        tuple(torch.randint(0, vocab, (budget,), generator=generator).tolist()), source="s"
    )


def partly_right(truth: Sequence[int], vocab: int, seed: int = 0) -> Propose:
    """Propose the truth with a third of the tokens spoiled."""
    generator = torch.Generator().manual_seed(seed)

    def propose(answer: list[int], budget: int) -> Draft:
        right = list(truth[len(answer) : len(answer) + budget])
        spoiled = torch.rand(len(right), generator=generator).tolist()
        return Draft(
            tuple((t + 1) % vocab if s < 0.3 else t for t, s in zip(right, spoiled, strict=True)),
            source="s",
        )

    return propose


def as_tree(propose: Propose, vocab: int, seed: int = 0) -> Propose:
    """Hang wrong siblings and stray branches around a chain."""
    generator = torch.Generator().manual_seed(seed)

    def grown(answer: list[int], budget: int) -> Draft:
        chain = propose(answer, budget).token_ids
        tokens: list[int] = []
        parents: list[int] = []
        last = -1
        for token in chain:
            stray = int(torch.randint(0, vocab, (1,), generator=generator))
            tokens += [stray, token, token]  # a stray sibling first, then the token, then a double
            parents += [last, last, last]
            last = len(tokens) - 2
        return Draft(tuple(tokens), tuple(parents), source="s")

    return grown


def scripts(vocab: int) -> dict[str, Callable[[Sequence[int]], Propose]]:
    """Return what makes each kind of draft of an answer's ``truth``, by name."""
    return {
        "oracle": oracle,
        "wrong": lambda truth: always_wrong(truth, vocab),
        "empty": lambda _truth: empty(),
        "too_long": too_long,
        "random": lambda _truth: random_tokens(vocab),
        "partly_right": lambda truth: partly_right(truth, vocab),
    }


def failing(after: int) -> Propose:
    """Propose nothing ``after`` times, then raise."""
    calls = 0

    def propose(answer: list[int], budget: int) -> Draft:
        nonlocal calls
        calls += 1
        if calls > after:
            msg = "the script says so"
            raise RuntimeError(msg)
        return Draft(source="s")

    return propose
