"""A model drafter of another vocabulary: by text where it is greedy, by shared tokens where it samples.

Greedy, the draft's text is the bridge (SLEM of arXiv 2502.05202, universal assisted generation): the drafter
keeps its own ids of the same text, and what it drafts is encoded anew for the target. Sampled, the drafter's
distribution is projected on the tokens that both know (TLI of the same paper, algorithm 4), which keeps it
known and block verification exact. Wherever the draft comes from, the answer is the target's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import torch

from rasd_integrations.drafters.base import Drafter, DraftSession, Needs
from rasd_integrations.drafters.papers.vocabulary import Vocabulary, unfinished
from rasd_integrations.types import Draft, DraftContext, TokenBlock

LEAST_SHARE = 0.25
"""Of the smaller vocabulary; where less is shared, sampled answers are drafted for by text, too."""


class RebasedSession(Protocol):
    """A session whose committed tokens may be written anew."""

    def propose(self, budget: int) -> Draft:
        """Return a draft of at most ``budget`` tokens."""
        ...

    def close(self) -> None:
        """Free what the session holds."""
        ...

    @property
    def ids(self) -> Sequence[int]:
        """Prompt and committed tokens."""
        ...

    def rebase(self, kept: int, new: Sequence[int]) -> None:
        """Replace the committed tokens from ``kept`` on by ``new``."""
        ...


class RebasingDrafter(Protocol):
    """A drafter in its own vocabulary; a :class:`ModelDrafter`."""

    def start(self, context: DraftContext) -> RebasedSession:
        """Begin an answer."""
        ...


class Translation:
    """Two vocabularies, and the tokens that stand for the same bytes in both.

    Special tokens are not shared, except that every end token of the drafter's is the target's.

    Attributes:
        to_target: ``[drafter vocab]`` int64: the target's id of each of the drafter's, or -1.
        share: Shared tokens as a part of the smaller vocabulary, in 0..1.
    """

    def __init__(
        self,
        target: Vocabulary,
        drafter: Vocabulary,
        *,
        target_ends: Collection[int],
        drafter_ends: Collection[int],
    ) -> None:
        """Match the tokens of the two; ``target_ends`` and ``drafter_ends`` end an answer."""
        self.target, self.drafter = target, drafter
        self.ends = drafter_ends
        # Of several ends the tokenizer's own is the one that chat models write.
        self.end = target.eos if target.eos in target_ends else min(target_ends, default=None)
        pairs = {
            i: target.ids[text]
            for i, text in enumerate(drafter.texts)
            if text in target.ids and i not in drafter.special
        }
        self.share = len(set(pairs.values())) / min(len(target.ids), len(drafter.ids))
        if self.end is not None:
            pairs |= dict.fromkeys(drafter_ends, self.end)
        self.to_target = torch.full((len(drafter.texts),), -1)
        self.to_target[list(pairs)] = torch.tensor(list(pairs.values()))

    @property
    def allowed(self) -> torch.Tensor:
        """``[drafter vocab]`` bool: the drafter's tokens that the target knows."""
        return self.to_target >= 0

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """Return the drafter's ids of a prompt; families that share their chat markup share its tokens."""
        bos = self.target.bos
        body = ids[len(bos) :] if bos and list(ids[: len(bos)]) == bos else ids
        return self.drafter.encode_prompt(self.target.join(body).decode("utf-8", "replace"))


class TranslatedDrafter(Drafter):
    """Drafts with a model whose token ids are not the target's.

    No other drafter helps it (:class:`CascadeDrafter`): a helper cannot take tokens back, which the drafter
    must where a word is encoded in another way once its end is known.

    Attributes:
        name: In the statistics; drafts are counted as ``bridge`` and ``projection``.
    """

    name = "translated"
    needs = Needs(prompt=True)

    def __init__(
        self, translation: Translation, free: RebasingDrafter, projected: RebasingDrafter
    ) -> None:
        """Translate the drafts of ``free``, and sampled ones of ``projected``.

        Args:
            translation: Between the drafter's vocabulary and the target's.
            free: Drafts in its own vocabulary.
            projected: The same, but only tokens that ``translation`` allows.
        """
        self.translation = translation
        self._free = free
        self._projected = projected

    def start(self, context: DraftContext) -> TranslatedSession:
        """Begin an answer; without a drafter prompt the drafter reads the target's."""
        own = context.drafter_prompt_ids
        prompt = self.translation.prompt(own if own is not None else context.prompt_ids)
        projects = context.temperature > 0 and self.translation.share >= LEAST_SHARE
        inner = DraftContext(
            prompt_ids=prompt,
            temperature=context.temperature if projects else 0.0,
            top_p=context.top_p,
            top_k=context.top_k,
            seed=context.seed,
        )
        session = (self._projected if projects else self._free).start(inner)
        return TranslatedSession(self.translation, session, context.prompt_ids, projects=projects)


class TranslatedSession(DraftSession):
    """A drafter of another vocabulary at work on one answer."""

    def __init__(
        self,
        translation: Translation,
        inner: RebasedSession,
        prompt_ids: Sequence[int],
        *,
        projects: bool,
    ) -> None:
        """Made by :meth:`TranslatedDrafter.start`."""
        self._translation = translation
        self._inner = inner
        self._ids = list(prompt_ids)  # the target's, prompt and committed answer
        self._held = b""  # the beginning of a character, which the drafter has not read
        self._projects = projects

    def propose(self, budget: int) -> Draft:
        """Return a chain of at most ``budget`` tokens of the target's."""
        if not self._projects:
            return self._bridged(self._inner.propose(budget), budget)
        if self._held:  # the drafter's distribution is one of whole characters here
            return Draft(source="projection")
        return self._translated(self._inner.propose(budget))

    def observe(self, block: TokenBlock) -> None:
        """Hand on the text that the target committed, as the drafter would have written it."""
        vocabularies = self._translation
        self._ids.extend(block.token_ids)
        data = self._held + vocabularies.target.join(block.token_ids)
        whole = len(data) - unfinished(data)
        self._held = data[whole:]
        self._inner.rebase(*vocabularies.drafter.extend(self._inner.ids, data[:whole]))

    def close(self) -> None:
        """Free what the drafter holds."""
        self._inner.close()

    def _translated(self, draft: Draft) -> Draft:
        """Return a draft of shared tokens, and its distribution, in the target's ids.

        Several of the drafter's tokens may stand for one of the target's: their chances add up.
        """
        if draft.probs is None:
            return replace(draft, source="projection")
        translation, device = self._translation, draft.probs.device
        rows = translation.allowed.nonzero().squeeze(-1)
        probs = draft.probs.new_zeros(len(draft), len(translation.target.texts))
        columns = translation.to_target[rows].to(device)
        probs.index_add_(1, columns, draft.probs[:, rows.to(device)])
        ids = translation.to_target[list(draft.token_ids)].tolist()
        return Draft(token_ids=tuple(ids), probs=probs, source="projection")

    def _bridged(self, draft: Draft, budget: int) -> Draft:
        """Return the text of a draft in the target's ids."""
        translation, ids = self._translation, draft.token_ids
        spoken = next((i for i, t in enumerate(ids) if self._is_silent(t)), len(ids))
        ends = list(accumulate(len(translation.drafter.texts[t]) for t in ids[:spoken]))
        data = translation.drafter.join(ids[:spoken])
        whole = len(data) - unfinished(data)
        held = len(self._held)
        if whole < held or not data.startswith(self._held):
            return Draft(source="bridge")
        new = translation.target.follow(self._ids, data[held:whole])
        places = accumulate((len(translation.target.texts[t]) for t in new), initial=held)
        # Some tokenizers compose characters (NFC), so that the new text may be a little longer.
        said_by = [min(bisect_left(ends, place), spoken - 1) for place in list(places)[1:]]
        stops = spoken < len(ids) and ids[spoken] in translation.ends and whole == len(data)
        if stops and translation.end is not None:
            new.append(translation.end)
            said_by.append(spoken)
        node_probs = draft.node_probs
        return Draft(
            token_ids=tuple(new[:budget]),
            source="bridge",
            node_probs=None
            if node_probs is None
            else tuple(node_probs[i] for i in said_by[:budget]),
        )

    def _is_silent(self, token: int) -> bool:
        """Whether one of the drafter's tokens stands for no text: special, or a row of padding."""
        drafter = self._translation.drafter
        return (
            not drafter.texts[token] or token in drafter.special or token in self._translation.ends
        )
