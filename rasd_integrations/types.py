"""The frozen records that travel between the rooms. Imports nothing of the package."""

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
"""End token, stop string or grammar's end; the budget; an answer that ended in tool calls."""
Message = Mapping[str, Any]
"""A chat message as chat templates read it: ``role``, ``content`` (text), and optional tool fields."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of retrieved text.

    Attributes:
        text: The text as stored.
        id: The store's id, where it has one.
        rank: Place in the search result, 0 is best. Scores are not comparable between stores.
        metadata: The store's metadata (``source``, ``ref_doc_id``, ``start_index``, ...).
    """

    text: str
    id: str | None = None
    rank: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that a drafter proposes: a chain, or a tree where ``parents`` is given.

    Attributes:
        token_ids: One id a node. A parent stands before its children.
        parents: Index of each node's parent in ``token_ids``, -1 for the root (the last committed
            token). ``None`` is the chain -1, 0, 1, ...
        probs: ``[num_nodes, vocab]`` float32, the distribution each token was *sampled* from; ``None`` for a
            deterministic draft. Sampled drafts are chains.
        logits: ``[num_nodes + 1, vocab]`` or ``[num_nodes, vocab]``, the drafter's raw logits at each
            node and after the last one; knowledge transfer needs them. Chains only.
        source: Name of the drafter, for the statistics.
        sources: Name of the drafter of each node, for drafts fused of several.
        node_probs: How likely the drafter thinks it that each node is reached and accepted, in 0..1; ``None``
            where it has no estimate. What a fused draft spends its nodes by.
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
        """Parent of each node, also of a chain's."""
        return range(-1, len(self) - 1) if self.parents is None else self.parents

    @property
    def is_chain(self) -> bool:
        """Whether every node is the only child of the one before it."""
        return self.parents is None or all(p == i - 1 for i, p in enumerate(self.parents))

    def head(self, n: int) -> Draft:
        """Return the first ``n`` nodes; parents stand before their children, so they are a draft of their own."""
        if n >= len(self):
            return self
        return replace(
            self,
            token_ids=self.token_ids[:n],
            parents=None if self.parents is None else self.parents[:n],
            probs=None if self.probs is None else self.probs[:n],
            logits=None if self.logits is None else self.logits[: n + 1],
            sources=None if self.sources is None else self.sources[:n],
            node_probs=None if self.node_probs is None else self.node_probs[:n],
        )

    def to(self, device: torch.device) -> Draft:
        """Return the draft with its tensors on ``device``; a drafter may stand on another than the target."""
        probs, logits = (t if t is None else t.to(device) for t in (self.probs, self.logits))
        if probs is self.probs and logits is self.logits:
            return self
        return replace(self, probs=probs, logits=logits)


@dataclass(frozen=True, slots=True)
class TokenBlock:
    """What one target step committed.

    Attributes:
        token_ids: The committed ids: accepted draft tokens, then the target's own (bonus or recovered) one.
        num_draft_tokens: Drafted tokens that the step verified.
        num_accepted_tokens: Drafted tokens among ``token_ids``.
        finish_reason: Set on the last block of a stream.
    """

    token_ids: tuple[int, ...]
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call as it is written.

    Attributes:
        index: Place of the call in the answer, 0 is the first.
        id: Set on the first piece of a call.
        name: Set on the first piece of a call.
        arguments: New text of its arguments; the join over all pieces is the model's JSON.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A tool call, whole.

    Attributes:
        id: Made here; unique in a process.
        name: The function; may be one that was not offered, where the model was free.
        arguments: JSON text as the model wrote it; may be broken where the model was free.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of the answer's text.

    Attributes:
        text: New text; may be empty (bytes held back, or the last chunk).
        token_ids: The ids committed since the chunk before.
        finish_reason: Set on the last chunk.
        stats: This answer's statistics, on the last chunk.
        reasoning: New text of the model's thoughts, which are no part of the answer.
        tool_calls: New pieces of tool calls.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stats: DecodingStats | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer: the join of its stream.

    Attributes:
        text: The answer, without the prompt, cut at the first stop string.
        token_ids: The ids behind it.
        finish_reason: ``"stop"``, ``"length"`` or ``"tool_calls"``.
        stats: This answer's statistics.
        reasoning: The model's thoughts, where it writes any.
        tool_calls: The tools that it calls.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: DecodingStats
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class GrammarState(Protocol):
    """Where an answer stands in its grammar: token ids only."""

    def mask(self) -> NDArray[np.int32]:
        """Return ``[ceil(vocab / 32)]`` words, the bit of each token that may follow set.

        Raises:
            DecodingError: The grammar became too large to follow.
        """
        ...

    def forced(self) -> Sequence[int]:
        """Return the tokens that must follow, as far as the grammar leaves no choice."""
        ...

    def push(self, token_id: int) -> bool:
        """Step over a token; ``False``, and no step, where it may not follow."""
        ...

    def pop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        ...

    def fork(self) -> GrammarState:
        """Return a state of its own that stands at the same place."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        ...

    @property
    def is_closing(self) -> bool:
        """Whether the answer had to be closed because its room ended."""
        ...

    @property
    def closed_tokens(self) -> int:
        """How many tokens were written since then; 0 where it was not."""
        ...


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a drafter may know of an answer before it starts.

    Attributes:
        prompt_ids: The target's prompt.
        chunk_ids: The retrieved chunks as token ids, best first.
        drafter_prompt_ids: The short prompt for a model drafter; ``None``: it reads the target's.
        temperature: 0 is greedy.
        top_p: Nucleus of the sampling distribution.
        top_k: 0 is off.
        seed: Seed of the drafter's own draws.
        wants_logits: Knowledge transfer is on: drafts must carry ``Draft.logits``.
        grammar: What the answer must match, at its start; the session's own, to be stepped over what it
            observes. Drafted tokens that the grammar forbids are cut, so a drafter may leave it unread.
    """

    prompt_ids: Sequence[int]
    chunk_ids: Sequence[Sequence[int]] = ()
    drafter_prompt_ids: Sequence[int] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    wants_logits: bool = False
    grammar: GrammarState | None = None
