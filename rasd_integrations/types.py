"""Records passed between packages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from rasd_integrations.stats import DecodingStats

FinishReason = Literal["stop", "length", "tool_calls"]
"""``"stop"``: end token, stop string or end of grammar; ``"length"``: max_tokens."""
Message = Mapping[str, Any]
"""A chat message for templates: ``role``, ``content`` (text), optional tool fields."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of retrieved text.

    Attributes:
        text: The text, as the prompt shows it.
        id: The store's id, if it has one.
        rank: Position in the search result, 0 is best; scores are not comparable between stores.
        metadata: The store's metadata (``source``, ``ref_doc_id``, ``start_index``, ...).
        stored: The text as stored, if the prompt shows another.
    """

    text: str
    id: str | None = None
    rank: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)
    stored: str | None = None

    @property
    def original(self) -> str:
        """The text as stored; positions in a chunk are positions in it."""
        return self.text if self.stored is None else self.stored


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that a drafter proposes: a chain, or a tree if ``parents`` is given.

    Attributes:
        token_ids: One id per node, parents before their children.
        parents: Index of each node's parent in ``token_ids``, -1 for the root (the last committed
            token). ``None`` is the chain -1, 0, 1, ...
        probs: ``[num_nodes, vocab]`` float32, the distribution each token was *sampled* from; ``None``
            for a deterministic draft. Sampled drafts are chains.
        logits: ``[num_nodes, vocab]``, the drafter's raw logits at each node; fused drafts take the next most likely
            tokens from them. Chains only.
        source: Name in the statistics; empty is the drafter's.
        sources: Name of each node's drafter, if several made the draft.
        node_probs: Estimated probability that each node is reached and accepted, if the drafter has one;
            fused drafts rank their nodes by it.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] | None = None
    probs: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    source: str = ""
    sources: tuple[str, ...] | None = None
    node_probs: tuple[float, ...] | None = None

    def __len__(self) -> int:
        """Return the number of drafted tokens."""
        return len(self.token_ids)

    @property
    def parent_of(self) -> Sequence[int]:
        """Index of each node's parent; computed for a chain."""
        return range(-1, len(self) - 1) if self.parents is None else self.parents

    @property
    def is_chain(self) -> bool:
        """True if every node is the only child of the one before it."""
        return self.parents is None or all(p == i - 1 for i, p in enumerate(self.parents))

    def head(self, n: int) -> Draft:
        """Return the draft of the first ``n`` nodes."""
        if n >= len(self):
            return self
        return replace(
            self,
            token_ids=self.token_ids[:n],
            parents=None if self.parents is None else self.parents[:n],
            probs=None if self.probs is None else self.probs[:n],
            logits=None if self.logits is None else self.logits[:n],
            sources=None if self.sources is None else self.sources[:n],
            node_probs=None if self.node_probs is None else self.node_probs[:n],
        )

    def to(self, device: torch.device) -> Draft:
        """Return the draft with its tensors on ``device``."""
        probs, logits = (t if t is None else t.to(device) for t in (self.probs, self.logits))
        if probs is self.probs and logits is self.logits:
            return self
        return replace(self, probs=probs, logits=logits)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability, and those of the most likely tokens at its position.

    Of the distribution that the answer follows, at temperature 1: penalties, grammar and knowledge transfer count,
    ``top_k``, ``top_p`` and ``min_p`` do not.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability.
        top: Ids and log-probabilities, most likely first; tokens that may not follow are left out.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class WrittenLogprob:
    """A token's log-probability as a server wrote it, with texts and not ids.

    Attributes:
        entry: OpenAI's ``token``, ``logprob``, ``bytes`` and ``top_logprobs``.
    """

    entry: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """The tokens that one target step committed.

    Attributes:
        token_ids: Accepted draft tokens, then the target's own (bonus or recovered) one.
        num_draft_tokens: Draft tokens that the step verified.
        num_accepted_tokens: Draft tokens among ``token_ids``.
        finish_reason: Set on the last block of a stream.
        logprobs: Of each of ``token_ids``, if they are asked for.
    """

    token_ids: tuple[int, ...]
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one target step verified and committed.

    Attributes:
        token_ids: Accepted draft tokens, then the target's own one.
        sources: Who drafted each of the accepted ones.
        drafted: Verified draft tokens, by who drafted them.
        off_reason: Why no token of a drafter was verified, if none was.
        draft_s: Seconds of drafting.
        verify_s: Seconds of the step itself.
    """

    token_ids: tuple[int, ...]
    sources: tuple[str, ...] = ()
    drafted: Mapping[str, int] = field(default_factory=dict)
    off_reason: str | None = None
    draft_s: float = 0.0
    verify_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A streamed piece of a tool call.

    Attributes:
        index: Index of the call in the answer.
        id: Set on the first piece of a call.
        name: Set on the first piece of a call.
        arguments: New text of its arguments; all pieces joined are the model's JSON.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A complete tool call.

    Attributes:
        id: Generated, unique in a process.
        name: The function; without a grammar it may be one that was not offered.
        arguments: The model's JSON text; without a grammar it may be malformed.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A streamed piece of an answer.

    Attributes:
        text: New text; may be empty (incomplete bytes, or the last piece).
        token_ids: The ids committed since the previous piece.
        finish_reason: Set on the last piece.
        stats: This answer's statistics, on the last piece.
        reasoning: New text of the model's reasoning, which is not part of ``text``.
        tool_calls: New pieces of tool calls.
        logprobs: Of each new token, if they are asked for.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stats: DecodingStats | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob | WrittenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A complete answer.

    Attributes:
        text: The answer without the prompt, cut at the first stop string.
        token_ids: Ids of all committed tokens; with a stop string they may go past the cut of ``text``.
        finish_reason: ``"stop"``, ``"length"`` or ``"tool_calls"``.
        stats: This answer's statistics.
        reasoning: The model's reasoning, if it writes any.
        tool_calls: Its tool calls.
        logprobs: Of each new token, if they are asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: DecodingStats
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob | WrittenLogprob, ...] = ()


class GrammarState(Protocol):
    """The state of an answer in its grammar."""

    def mask(self) -> NDArray[np.int32]:
        """Return the token mask ``[ceil(vocab / 32)]`` (``token_mask``) of what may follow.

        Raises:
            DecodingError: The grammar became too large to follow.
        """
        ...

    def forced(self) -> Sequence[int]:
        """Return the tokens that must follow, while the grammar leaves no choice."""
        ...

    def push(self, token_id: int) -> bool:
        """Advance by one token; return False, and do nothing, if it may not follow."""
        ...

    def pop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        ...

    def fork(self) -> GrammarState:
        """Return an independent copy."""
        ...

    @property
    def finished(self) -> bool:
        """True if only the end may follow."""
        ...

    @property
    def is_closing(self) -> bool:
        """True if the answer is being closed because ``max_tokens`` is near."""
        ...

    @property
    def closed_tokens(self) -> int:
        """Tokens written since then; 0 if it is not closing."""
        ...


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter is given when an answer starts.

    Attributes:
        prompt_ids: The target's prompt.
        chunk_ids: The retrieved chunks as token ids, best first.
        drafter_prompt_ids: The short prompt for a model drafter; ``None``: it reads the target's.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampling distribution.
        top_k: 0 is off.
        seed: Seed of the drafter's own sampling.
        source: The pipeline's store, if all that it returns may be drafted from.
        filter: Of the pipeline's own searches in it.
        grammar: The grammar's initial state, owned by the session, which advances it over what it
            observes. Optional to use: tokens that the grammar forbids are cut from drafts.
    """

    prompt_ids: Sequence[int]
    chunk_ids: Sequence[Sequence[int]] = ()
    drafter_prompt_ids: Sequence[int] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    source: object = None
    filter: Any = None
    grammar: GrammarState | None = None
