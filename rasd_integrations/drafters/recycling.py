"""Token Recycling: trees of the target's own top-k tokens after the same last tokens (arXiv 2408.08696).

Every row of logits that the target computes, in the prompt and behind rejected drafts too, predicts a next token. Its
top-k tokens are kept under the one to four tokens before it; longer keys and the latest occurrence are RACER's
copy-logit (arXiv 2604.14885). A draft interpolates the rows found under all its last tokens, as an n-gram model does,
and grows the tree best first. Interpolation and the row before the last token are ours
(docs/explanation/experiments.md).

The rows of the prompt come from its final hidden states, kept beside keys and values. On a CPU, beside a drafter that
copies from the prompt, they cost more than they save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rasd_integrations.config import check_value
from rasd_integrations.drafters.base import Drafter, DraftSession, Needs
from rasd_integrations.drafters.candidates import Candidates, Shortlist
from rasd_integrations.drafters.tree import grow
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.types import Draft, DraftContext, TokenBlock

# Weight of a match on 1, 2, 3 or 4 tokens; the rest goes to shorter matches.
_TRUST = (0.45, 0.6, 0.75, 0.85)
# LogitSpec: the previous logits also predict the token after a new one.
_TRUST_BEFORE = 0.5
_KEY = len(_TRUST)
# Weight of the token that did follow in the prompt: RAG answers copy.
_COPIED = 0.4
# Flattens a distribution before it is reused elsewhere, where it is over-confident.
_FLATTENING = 0.7
_BATCH = 1024  # positions of the prompt per call of the output layer

Tail = tuple[int, ...]
"""The last tokens before a position, at most 5, the latest last."""


class CandidateIndex:
    """Top-k rows by the tokens before them: the latest occurrence counts, the oldest rows are evicted."""

    def __init__(self, max_rows: int, width: int) -> None:
        """Keep the last ``max_rows`` rows of ``width`` candidates."""
        self._max_rows = max_rows
        self._newest = 0  # rows ever added; row i is in slot i % max_rows
        self._numbers: dict[Tail, int] = {}  # latest row after these tokens
        self._token_ids = np.empty((max_rows, width), np.int32)  # memory is taken row by row
        self._weights = np.empty((max_rows, width), np.float32)

    def add(self, tails: Sequence[Tail], candidates: Candidates) -> None:
        """Keep ``candidates``; row ``i`` follows the tokens ``tails[i]``."""
        first, self._newest = self._newest, self._newest + len(tails)
        for number, tail in enumerate(tails, start=first):
            for n in range(1, min(len(tail), _KEY) + 1):
                self._numbers[tail[-n:]] = number
        slots = np.arange(first, self._newest)[-self._max_rows :] % self._max_rows
        self._token_ids[slots] = candidates.token_ids[-len(slots) :]
        self._weights[slots] = candidates.probs[-len(slots) :] ** _FLATTENING
        oldest, every = self._newest - self._max_rows, -(-self._max_rows // 4)
        if oldest > 0 and self._newest // every > first // every:
            self._numbers = {tail: n for tail, n in self._numbers.items() if n >= oldest}

    def distribution(self, tail: Tail) -> dict[int, float]:
        """Return a score in 0..1 of each token that is known to follow ``tail``."""
        scores: dict[int, float] = {}
        left = 1.0
        for n in range(min(len(tail), _KEY), 0, -1):
            if (slot := self._find(tail[-n:])) is not None:
                share = left * _TRUST[n - 1]
                left -= share
                for token, weight in self._row(slot):
                    scores[token] = scores.get(token, 0.0) + share * weight
        if (slot := self._find(tail[:-1][-_KEY:])) is not None:
            for token, weight in self._row(slot):
                if token != tail[-1]:
                    scores[token] = scores.get(token, 0.0) + left * _TRUST_BEFORE * weight
        scores.pop(-1, None)
        return scores

    def _row(self, slot: int) -> zip[tuple[int, float]]:
        return zip(self._token_ids[slot].tolist(), self._weights[slot].tolist(), strict=True)

    def _find(self, key: Tail) -> int | None:
        """Return the slot of the latest row after exactly these tokens."""
        number = self._numbers.get(key, -1)
        return None if number < max(0, self._newest - self._max_rows) else number % self._max_rows


class RecyclingSession(DraftSession):
    """The rows of one answer, kept as they are computed."""

    def __init__(self, drafter: RecyclingDrafter, context: DraftContext) -> None:
        """Made by :meth:`RecyclingDrafter.start`."""
        self._drafter = drafter
        self._index = CandidateIndex(drafter.max_rows, drafter.num_candidates)
        self._prompt = tuple(context.prompt_ids)
        self._tail: Tail = self._prompt[-_KEY - 1 :]
        self._shortlist: Shortlist

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Receive the target's output layer, and the prompt's hidden states."""
        self._shortlist = Shortlist(target.model, self._prompt, self._drafter.num_candidates)
        if self._drafter.prompt:
            self._add_prompt(buffer)

    @torch.inference_mode()
    def _add_prompt(self, buffer: KVBuffer) -> None:
        """Add the row of each position of the prompt that a token follows, the latest ``max_rows``."""
        ids, end = self._prompt, len(self._prompt) - 1
        first = max(end - self._drafter.max_rows, 0)
        rows = Candidates.unknown(end - first, self._drafter.num_candidates)
        known, hidden = buffer.hidden(
            first
        )  # earlier ones may come from a prefix kept without them
        for start in range(known, end, _BATCH):
            part = hidden[start - known : min(start + _BATCH, end) - known]
            found, at = self._shortlist.of_hidden(part), start - first
            rows.token_ids[at : at + len(found)] = found.token_ids
            rows.probs[at : at + len(found)] = found.probs
        tails = [ids[max(i - _KEY, 0) : i + 1] for i in range(first, end)]
        self._index.add(tails, _with_copied(rows, np.asarray(ids[first + 1 :], np.int32)))

    def learn(self, draft: Draft, logits: Tensor) -> None:
        """Add the rows after the last committed token and after each node of the draft, rejected ones too."""
        tails = [self._tail]
        for token, parent in zip(draft.token_ids, draft.parent_of, strict=True):
            tails.append(_after(tails[parent + 1], token))
        self._index.add(tails, self._shortlist.of_logits(logits))

    def propose(self, budget: int) -> Draft:
        """Return the most probable tree of at most ``budget`` tokens."""
        drafter = self._drafter

        def children(tail: Tail, prob: float) -> Iterator[tuple[float, int, Tail]]:
            if prob >= min(2 * drafter.min_probability, 1.0):
                for token, score in self._index.distribution(tail).items():
                    yield prob * score, token, _after(tail, token)

        most = min(budget, drafter.max_draft)
        token_ids, parents, probs = grow(self._tail, children, most, drafter.min_probability)
        return Draft(token_ids, parents, source=drafter.name, node_probs=probs)

    def observe(self, block: TokenBlock) -> None:
        """Move on to the committed tokens."""
        self._tail = (self._tail + tuple(block.token_ids))[-_KEY - 1 :]

    def close(self) -> None:
        """Free the rows."""
        self._index = CandidateIndex(1, self._drafter.num_candidates)


class RecyclingDrafter(Drafter):
    """Proposes trees of the target's top-k tokens after the same last tokens.

    Nothing is kept between answers but the hidden states of a cached prompt, in its namespace of the prefix cache.
    """

    def __init__(
        self,
        name: str = "recycling",
        *,
        prompt: bool = True,
        num_candidates: int = 8,
        max_draft: int = 64,
        min_probability: float = 0.02,
        max_rows: int = 32_768,
    ) -> None:
        """Configure what is kept and drafted.

        Args:
            name: Name in the statistics.
            prompt: Draft from the prompt's positions too, else from those of the running answer alone.
            num_candidates: Tokens kept of each row, 1 to 64.
            max_draft: Maximum tokens of a draft.
            min_probability: Least product of the scores along a path.
            max_rows: Maximum rows kept of an answer, the latest; a row takes about 1 KiB with its keys.

        Raises:
            ConfigurationError: A number is outside its range.
        """
        for option, value, least, most in (
            ("num_candidates", num_candidates, 1, 64),
            ("max_draft", max_draft, 1, None),
            ("max_rows", max_rows, 1, None),
        ):
            limits = f"at least {least}" if most is None else f"{least} to {most}"
            check_value(least <= value and (most is None or value <= most), option, value, limits)
        self.name = name
        self.prompt = prompt
        self.needs = Needs(hidden=prompt)
        self.num_candidates = num_candidates
        self.max_draft = max_draft
        self.min_probability = min_probability
        self.max_rows = max_rows

    def start(self, context: DraftContext) -> RecyclingSession:
        """Start an answer."""
        return RecyclingSession(self, context)


def _with_copied(rows: Candidates, following: NDArray[np.int32]) -> Candidates:
    """Put the token that did follow each row among its candidates."""
    token_ids, probs = rows.token_ids, (1 - _COPIED) * rows.probs
    same = token_ids == following[:, None]
    # It replaces the least likely one; of an unknown row the first.
    instead = np.where(token_ids[:, 0] < 0, 0, token_ids.shape[1] - 1)
    row, column = np.arange(len(rows)), np.where(same.any(1), same.argmax(1), instead)
    probs[row, column] = np.where(same.any(1), probs[row, column], 0) + _COPIED
    token_ids[row, column] = following
    return Candidates(token_ids, probs)


def _after(tail: Tail, token: int) -> Tail:
    return (*tail[-_KEY:], token)
