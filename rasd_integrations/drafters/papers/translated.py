"""Drafts with a model of another vocabulary: through text if greedy, through shared tokens if sampled.

Greedy (SLEM of arXiv 2502.05202, universal assisted generation), the drafter keeps its own ids of the same text, and
what it drafts is tokenised again for the target. Sampled (TLI of the same paper, algorithm 4), the drafter's
distribution is projected on the tokens that both have, so that it stays known and block verification exact.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from rasd_integrations.drafters.base import Drafter, DraftSession, Needs
from rasd_integrations.drafters.model import ModelDrafter, ModelSession
from rasd_integrations.drafters.papers.vocabulary import Vocabulary, unfinished
from rasd_integrations.types import Draft, DraftContext, TokenBlock

LEAST_SHARE = 0.25
"""Of the smaller vocabulary; if less is shared, sampled answers are drafted through text, too."""


class Translation:
    """Two vocabularies, and the tokens that are the same bytes in both.

    Special tokens are not shared, except that every end token of the drafter's is the target's.

    Attributes:
        to_target: ``[drafter vocab]`` int64: the target's id of each of the drafter's, or -1.
        share: Fraction of the smaller vocabulary that is shared.
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
        """``[drafter vocab]`` bool: the drafter's tokens that the target has."""
        return self.to_target >= 0

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """Return the drafter's ids of a prompt; control tokens that both have stay control tokens."""
        bos = self.target.bos
        body = ids[len(bos) :] if bos and list(ids[: len(bos)]) == bos else ids
        return self.drafter.encode_prompt(self.target.join(body).decode("utf-8", "replace"))


class TranslatedDrafter(Drafter):
    """Drafts with a model whose token ids are not the target's.

    It takes no helper (:class:`CascadeDrafter`): a helper cannot take tokens back, as the drafter must when a word is
    tokenised differently once its end is known.

    Attributes:
        name: Name in messages; the statistics count ``bridge`` and ``projection``.
    """

    name = "translated"
    needs = Needs(prompt=True)

    def __init__(
        self, translation: Translation, free: ModelDrafter, projected: ModelDrafter
    ) -> None:
        """Translate drafts.

        Args:
            translation: Between the drafter's vocabulary and the target's.
            free: Drafts greedily in its own vocabulary.
            projected: Samples, with only the tokens that ``translation`` allows.
        """
        self.translation = translation
        self._free = free
        self._projected = projected

    def start(self, context: DraftContext) -> TranslatedSession:
        """Start an answer; without a drafter prompt the drafter reads the target's."""
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
    """State of one answer: the target's ids, and the drafter's session over the same text."""

    def __init__(
        self,
        translation: Translation,
        inner: ModelSession,
        prompt_ids: Sequence[int],
        *,
        projects: bool,
    ) -> None:
        """Made by :meth:`TranslatedDrafter.start`."""
        self._translation = translation
        self._inner = inner
        self._ids = list(prompt_ids)  # the target's, prompt and committed answer
        self._held = b""  # bytes of an incomplete character, which the drafter has not read
        self._projects = projects

    def propose(self, budget: int) -> Draft:
        """Return a chain of at most ``budget`` of the target's tokens."""
        if not self._projects:
            return self._bridged(self._inner.propose(budget), budget)
        if self._held:  # the drafter's distribution is over whole characters
            return Draft(source="projection")
        return self._translated(self._inner.propose(budget))

    def observe(self, block: TokenBlock) -> None:
        """Pass on the text that the target committed, as the drafter tokenises it."""
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

        Several of the drafter's tokens may be one of the target's: their probabilities add up.
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
        num_text = next((i for i, t in enumerate(ids) if self._has_no_text(t)), len(ids))
        ends = list(accumulate(len(translation.drafter.texts[t]) for t in ids[:num_text]))
        data = translation.drafter.join(ids[:num_text])
        whole = len(data) - unfinished(data)
        held = len(self._held)
        if whole < held or not data.startswith(self._held):
            return Draft(source="bridge")
        new = translation.target.follow(self._ids, data[held:whole])
        offsets = accumulate((len(translation.target.texts[t]) for t in new), initial=held)
        # Some tokenizers compose characters (NFC), so the new text may be a little longer.
        source_of = [min(bisect_left(ends, offset), num_text - 1) for offset in list(offsets)[1:]]
        stops = num_text < len(ids) and ids[num_text] in translation.ends and whole == len(data)
        if stops and translation.end is not None:
            new.append(translation.end)
            source_of.append(num_text)
        node_probs = draft.node_probs
        return Draft(
            token_ids=tuple(new[:budget]),
            source="bridge",
            node_probs=None
            if node_probs is None
            else tuple(node_probs[i] for i in source_of[:budget]),
        )

    def _has_no_text(self, token: int) -> bool:
        """Return True if one of the drafter's tokens has no text: special, or padding of the vocabulary."""
        drafter = self._translation.drafter
        return (
            not drafter.texts[token] or token in drafter.special or token in self._translation.ends
        )
