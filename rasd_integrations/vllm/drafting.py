"""The drafts of one request: of several sources the one with the most tokens to be expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from rasd_integrations.drafters.base import DraftSession
from rasd_integrations.drafters.calibration import Calibration
from rasd_integrations.drafters.datastore import DatastoreDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.types import Draft, DraftContext, TokenBlock
from rasd_integrations.vllm.memory import Namespace

MOST_INDEXED = (
    32_768  # last tokens of a prompt: indexing takes 2 to 5 microseconds each in vLLM's loop
)
REQUEST, MEMORY = "request", "memory"


@dataclass
class Source:
    """What all requests have shown of a source of drafts.

    Its calibration counts each draft, sent to vLLM or not: a source that does not pay sends none, and is tried again
    as soon as it would pay.
    """

    calibration: Calibration = field(default_factory=Calibration)
    drafted: int = 0
    accepted: int = 0


class RequestDrafts:
    """Drafts from the prompt, the answer, the chunks and the memory of a running request."""

    def __init__(
        self,
        prompt_ids: Sequence[int],
        chunks: Sequence[Sequence[int]],
        space: Namespace | None,
        sources: dict[str, Source],
        least_probability: float,
    ) -> None:
        """Index prompt and chunks.

        Args:
            prompt_ids: The request's.
            chunks: Sent with it.
            space: Its memory, if it has one.
            sources: What is known of each source; shared.
            least_probability: Of a drafted token.
        """
        context = DraftContext(prompt_ids=prompt_ids[-MOST_INDEXED:], chunk_ids=chunks)
        self._parts: list[tuple[str, DraftSession]] = [(REQUEST, SuffixDrafter().start(context))]
        if space is not None:
            # Chains, since vLLM takes no trees here.
            memory = DatastoreDrafter(space, max_rows=32, tree=False)
            self._parts.append((MEMORY, memory.start(context)))
        self._space, self._sources, self._least = space, sources, least_probability
        self._prompt, self._answer = context.prompt_ids, list[int]()
        self._drafts: dict[str, Draft] = {}
        self._sent: tuple[str, tuple[int, ...]] | None = None

    def observe(self, token_ids: Sequence[int]) -> None:
        """Take what vLLM committed; count what was right of the last drafts."""
        if self._sent is not None:
            name, ids = self._sent
            right = [*takewhile(lambda pair: pair[0] == pair[1], zip(ids, token_ids, strict=False))]
            self._sources[name].drafted += len(ids)
            self._sources[name].accepted += min(len(right), len(token_ids) - 1)
        for name, session in self._parts:
            if name in self._drafts:
                self._sources[name].calibration.count(self._drafts[name], token_ids)
            session.observe(TokenBlock(tuple(token_ids)))
        self._answer += token_ids
        self._drafts, self._sent = {}, None

    def propose(self, most: int) -> list[int]:
        """Return at most ``most`` tokens, none if none is likely enough."""
        best = 0.0
        for name, session in self._parts if most > 0 else ():
            draft = self._drafts[name] = session.propose(most)
            probs = self._sources[name].calibration.node_probs(draft)
            kept = [*takewhile(lambda p: p >= self._least, probs)]
            if sum(kept) > best:
                best, self._sent = sum(kept), (name, draft.token_ids[: len(kept)])
        return [] if self._sent is None else [*self._sent[1]]

    def remember_nothing(self) -> None:
        """Do not remember the answer."""
        self._space = None

    def close(self) -> None:
        """Remember the answer; free the index."""
        if self._space is not None and self._answer:
            self._space.answers.add(self._prompt, self._answer)
        for _, session in self._parts:
            session.close()
