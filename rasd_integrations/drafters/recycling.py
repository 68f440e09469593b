"""A tree of what the target itself found likely after the same last tokens. No model, no training.

Every row of logits that the target computes, in the prompt and behind refused drafts too, says what it would
write next there. Its few most likely tokens are kept under the last one to four tokens of the place (Token
Recycling, arXiv 2408.08696; longer keys and the latest occurrence from RACER's copy-logit, arXiv 2604.14885).
A draft mixes the rows found under all of its last tokens as an interpolated n-gram model does and grows the
tree best first. Mixing and the row before the last token are ours: docs/explanation/experiments.md.

Of the prompt's places the final hidden states are at hand, kept beside keys and values. Their candidates are
worked out when a draft first passes near them, few places of thousands. On a CPU that is most of what a draft
takes, and beside a drafter that copies from the prompt it can be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rasd_integrations.drafters.base import Drafter, DraftSession, Needs
from rasd_integrations.drafters.candidates import Candidates, Shortlist
from rasd_integrations.drafters.tree import grow
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

# How far a row is trusted that was found under 1, 2, 3 or 4 tokens; what is left goes to the shorter keys.
_TRUST = (0.45, 0.6, 0.75, 0.85)
# The distribution that gave the last token predicts the next one too, where that token is new (LogitSpec).
_TRUST_BEFORE = 0.5
_KEY = len(_TRUST)
# What did follow in the prompt is a candidate too, with this weight: RAG answers copy.
_COPIED = 0.4
# A distribution of one place is surer of its first token than a guess at another place may be.
_FLATTENING = 0.7
# Rows around a missing one are computed with it: texts are copied on from there, and a call costs more than a row.
_BLOCK = 32
# Rows worked out at once where each call has to wait for a device.
_BATCH = 1024

Tail = tuple[int, ...]
"""The last tokens of a place, the latest last; fewer near the start of a text."""
# A tail is known by the sum of its tokens times these, modulo 2^64, which is made of all places of a prompt at once.
# Where two tails met, drafts would be the worse for it and nothing else.
_MIXERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
_WORD = (1 << 64) - 1
Fetch = Callable[[NDArray[np.int64]], Candidates]
"""Works out the candidates of rows that were announced before."""


class CandidateIndex:
    """Rows of candidates by the tokens before them: the latest occurrence counts, the oldest rows go."""

    def __init__(self, max_rows: int, width: int) -> None:
        """Keep the last ``max_rows`` rows of ``width`` candidates."""
        self._max_rows = max_rows
        self._newest = 0  # rows ever added; row i lies in slot i % max_rows
        self._keys: dict[int, int] = {}
        self._token_ids = np.empty((max_rows, width), np.int32)  # memory is taken row by row
        self._weights = np.empty((max_rows, width), np.float32)
        self._known = np.zeros(max_rows, bool)
        self._fetch: Fetch | None = None
        self._announced = 0

    def announce(self, token_ids: Sequence[int], fetch: Fetch) -> None:
        """Make one row known behind each of a text's tokens; ``fetch`` works out those that are asked for.

        The first rows only, and at most ``max_rows``.
        """
        self._fetch = fetch
        self._announced = self._newest = len(token_ids)
        ids = np.asarray(token_ids, np.uint64) + np.uint64(1)
        key = np.zeros(len(ids), np.uint64)
        for n, mixer in enumerate(_MIXERS[: len(ids)]):
            key[n:] += ids[: len(ids) - n] * np.uint64(mixer)
            self._keys.update(zip(key[n:].tolist(), range(n, len(ids)), strict=True))

    def add(self, tails: Sequence[Tail], candidates: Candidates) -> None:
        """Keep ``candidates``; row ``i`` follows the tokens ``tails[i]``."""
        numbers = self._number(tails)
        self._put(np.asarray(numbers[-self._max_rows :]), candidates)

    def fill(self) -> None:
        """Work out every announced row, where one by one would be slower."""
        wanted = np.flatnonzero(~self._known[: min(self._newest, self._max_rows)])
        for start in range(0, len(wanted), _BATCH):
            self._work_out(wanted[start : start + _BATCH])

    def distribution(self, tail: Tail) -> dict[int, float]:
        """Return how likely each token is to follow ``tail``, as far as rows are known: a score in 0..1."""
        rows = self._rows(tail)
        if missing := [slot for _, slot in rows if not self._known[slot]]:
            self._work_out(np.asarray(missing))
        distribution: dict[int, float] = {}
        left = 1.0
        for n, slot in rows:
            if n:
                share = left * _TRUST[n - 1]
                left -= share
                for token, weight in self._row(slot):
                    distribution[token] = distribution.get(token, 0.0) + share * weight
            else:
                for token, weight in self._row(slot):
                    if token != tail[-1]:
                        distribution[token] = (
                            distribution.get(token, 0.0) + left * _TRUST_BEFORE * weight
                        )
        distribution.pop(-1, None)
        return distribution

    def _rows(self, tail: Tail) -> list[tuple[int, int]]:
        """Return the slots found under the last 4, 3, 2 and 1 tokens, and as 0 that of the row before."""
        under = [(n, self._find(key)) for n, key in enumerate(_keys(tail), start=1)]
        before = [(0, self._find(key)) for key in _keys(tail[:-1])[-1:]]
        return [(n, slot) for n, slot in (*reversed(under), *before) if slot is not None]

    def _row(self, slot: int) -> zip[tuple[int, float]]:
        return zip(self._token_ids[slot].tolist(), self._weights[slot].tolist(), strict=True)

    def _find(self, key: int) -> int | None:
        """Return the slot of the latest row under exactly the tail of ``key``."""
        number = self._keys.get(key, -1)
        return None if number < max(0, self._newest - self._max_rows) else number % self._max_rows

    def _number(self, tails: Sequence[Tail]) -> range:
        """Give each place the next number, known under its last 1 to 4 tokens."""
        first, self._newest = self._newest, self._newest + len(tails)
        numbers = range(first, self._newest)
        keys = self._keys
        for number, tail in zip(numbers, tails, strict=True):
            for key in _keys(tail):
                keys[key] = number
        self._known[np.asarray(numbers[-self._max_rows :], np.int64) % self._max_rows] = False
        oldest, every = self._newest - self._max_rows, -(-self._max_rows // 4)
        if oldest > 0 and self._newest // every > first // every:
            self._keys = {key: number for key, number in keys.items() if number >= oldest}
        return numbers

    def _work_out(self, slots: NDArray[np.int64]) -> None:
        # Announced rows came first and no more than there are slots: number and slot are the same.
        if self._fetch is not None:
            near = np.unique(slots // _BLOCK)[:, None] * _BLOCK + np.arange(_BLOCK)
            near = near[near < self._announced]
            near = near[~self._known[near]]
            self._put(near, self._fetch(near))

    def _put(self, numbers: NDArray[np.int64], candidates: Candidates) -> None:
        slots = numbers % self._max_rows
        self._token_ids[slots] = candidates.token_ids[-len(slots) :]
        self._weights[slots] = candidates.probs[-len(slots) :] ** _FLATTENING
        self._known[slots] = True


class RecyclingSession(DraftSession):
    """The rows of one answer, kept as they are computed."""

    def __init__(self, drafter: RecyclingDrafter, context: DraftContext) -> None:
        """Know the prompt, and nothing yet of what may follow its tokens."""
        self._drafter = drafter
        self._index = CandidateIndex(drafter.max_rows, drafter.num_candidates)
        self._prompt = tuple(context.prompt_ids)
        self._tail: Tail = self._prompt[-_KEY - 1 :]
        self._shortlist: Shortlist

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Take the target's output layer, and what the buffer holds of the prompt."""
        self._shortlist = Shortlist(target.model, self._prompt, self._drafter.num_candidates)
        if self._drafter.prompt:
            self._announce(buffer)
            if target.device.type != "cpu":
                self._index.fill()

    def _announce(self, buffer: KVBuffer) -> None:
        """Make the prompt's places known; the buffer holds their final hidden states."""
        ids, k, shortlist = self._prompt, self._drafter.num_candidates, self._shortlist
        first = max(len(ids) - 1 - self._drafter.max_rows, 0)
        following = np.asarray(ids[1:], np.int32)

        @torch.inference_mode()
        def fetch(numbers: NDArray[np.int64]) -> Candidates:
            places = numbers + first
            start, hidden = buffer.hidden()
            rows = Candidates.unknown(len(places), k)
            known = places >= start
            if known.any():
                wanted = torch.from_numpy(places[known] - start).to(hidden.device)
                ranked = shortlist.of_hidden(hidden[wanted])
                rows.token_ids[known], rows.probs[known] = ranked.token_ids, ranked.probs
            return _with_copied(rows, following[places])

        self._index.announce(ids[first:-1], fetch)

    def learn(self, draft: Draft, logits: Tensor) -> None:
        """Learn what may follow the last committed token and each node of the draft, refused ones too."""
        tails = [self._tail]
        for token, parent in zip(draft.token_ids, draft.parent_of, strict=True):
            tails.append(_after(tails[parent + 1], token))
        self._index.add(tails, self._shortlist.of_logits(logits))

    def propose(self, budget: int) -> Draft:
        """Return the most likely tree of at most ``budget`` tokens."""
        drafter = self._drafter

        def children(tail: Tail, prob: float) -> Iterator[tuple[float, int, Tail]]:
            if prob >= min(2 * drafter.min_probability, 1.0):
                for token, score in self._index.distribution(tail).items():
                    yield prob * score, token, _after(tail, token)

        most = min(budget, drafter.max_draft)
        token_ids, parents, scores = grow(self._tail, children, most, drafter.min_probability)
        return Draft(token_ids, parents, source=drafter.name, node_probs=scores)

    def observe(self, block: TokenBlock) -> None:
        """Step on to the committed tokens."""
        self._tail = (self._tail + tuple(block.token_ids))[-_KEY - 1 :]

    def close(self) -> None:
        """Free the rows."""
        self._index = CandidateIndex(1, self._drafter.num_candidates)


class RecyclingDrafter(Drafter):
    """Proposes trees of what the target found likely at places that ended in the same tokens.

    Nothing is kept between answers but the hidden states of a cached prompt, which lie in its namespace of
    the prefix cache.
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
        """Set what is kept and what is worth drafting.

        Args:
            name: Name in the statistics.
            prompt: Draft from the prompt's places too, else from those of the running answer alone.
            num_candidates: Tokens kept of each row, 1 to 64.
            max_draft: Largest draft, in tokens.
            min_probability: Least product of the scores along a path.
            max_rows: Rows kept of an answer, the latest; one row takes about 500 bytes with its keys.

        Raises:
            ConfigurationError: A number is outside its range.
        """
        for option, value, least, most in (
            ("num_candidates", num_candidates, 1, 64),
            ("max_draft", max_draft, 1, None),
            ("max_rows", max_rows, 1, None),
        ):
            if value < least or (most is not None and value > most):
                limits = f"at least {least}" if most is None else f"{least} to {most}"
                msg = f"{option} is {value}, but must be {limits}."
                raise ConfigurationError(msg)
        self.name = name
        self.prompt = prompt
        self.needs = Needs(hidden=prompt)
        self.num_candidates = num_candidates
        self.max_draft = max_draft
        self.min_probability = min_probability
        self.max_rows = max_rows

    def start(self, context: DraftContext) -> RecyclingSession:
        """Begin an answer."""
        return RecyclingSession(self, context)


def _with_copied(rows: Candidates, following: NDArray[np.int32]) -> Candidates:
    """Put the token that did follow each row among its candidates."""
    token_ids, probs = rows.token_ids, (1 - _COPIED) * rows.probs
    same = token_ids == following[:, None]
    # The least likely one makes room; a row of which nothing is known has it first.
    instead = np.where(token_ids[:, 0] < 0, 0, token_ids.shape[1] - 1)
    row, column = np.arange(len(rows)), np.where(same.any(1), same.argmax(1), instead)
    probs[row, column] = np.where(same.any(1), probs[row, column], 0) + _COPIED
    token_ids[row, column] = following
    return Candidates(token_ids, probs)


def _keys(tail: Tail) -> list[int]:
    """Return what the last 1, 2, 3 and 4 tokens of ``tail`` are known by, as far as it goes."""
    keys, key = [], 0
    for token, mixer in zip(reversed(tail), _MIXERS, strict=False):
        key = (key + (token + 1) * mixer) & _WORD
        keys.append(key)
    return keys


def _after(tail: Tail, token: int) -> Tail:
    return (*tail[-_KEY:], token)
