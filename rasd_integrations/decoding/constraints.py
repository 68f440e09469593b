"""Applies grammar, logits processors, end tokens and length to an answer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rasd_integrations.config import Sampling
from rasd_integrations.engine.generation_config import logits_processors
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.constraints import (
    Bits,
    allowed,
    guide,
    mask_visited,
    processed_rows,
)
from rasd_integrations.errors import DecodingError
from rasd_integrations.types import Draft, FinishReason, GrammarState


class Constraints:
    """Constraints of one answer; the grammar's state follows the committed tokens."""

    def __init__(
        self,
        target: TargetModel,
        params: Sampling,
        grammar: GrammarState | None,
        prompt_tokens: int,
        *,
        all_rows: bool = False,
    ) -> None:
        """Read the options of the call and of the target's checkpoint.

        ``all_rows``: every row is masked, not only those that greedy verification reads.
        """
        self._grammar = grammar
        self._eos_ids = target.eos_ids
        self._ends_at_eos = not params.ignore_eos
        self._processors = logits_processors(target.model, params, prompt_tokens, target.eos_ids)
        self._masks: Bits | None = None
        # Greedy verification reads few rows, and which ones is known from the logits; penalties change them.
        self._masks_visited = (
            grammar is not None
            and params.temperature == 0
            and not self._processors
            and not all_rows
        )

    def restrict(self, draft: Draft, room: int) -> Draft:
        """Return what the grammar allows of ``draft``, followed by tokens that it forces.

        Args:
            draft: Chain or tree.
            room: Most tokens of the result if any are forced; 0 adds none.
        """
        self._masks = None
        if self._grammar is None:
            return draft
        if self._masks_visited and draft.probs is None:
            return allowed(self._grammar, draft, room, self._eos_ids)
        draft, self._masks = guide(self._grammar, draft, room, self._eos_ids)
        return draft

    def apply(self, logits: Tensor, ids: Sequence[int], draft: Draft) -> Tensor:
        """Return the processed logits; ``draft`` is the last one restricted."""
        if self._grammar is not None and self._masks is None:
            return mask_visited(self._grammar, logits, draft, self._eos_ids)
        return processed_rows(self._processors, logits, ids, draft, self._masks)

    def cut(self, tokens: list[int], room: int) -> tuple[list[int], FinishReason | None]:
        """End at an end token, the grammar's end or ``room`` tokens; advance the grammar."""
        tokens = tokens[:room]
        reason: FinishReason | None = "length" if len(tokens) == room else None
        grammar = self._grammar
        for i, token in enumerate(tokens):
            is_end = token in self._eos_ids
            if grammar is None:
                if is_end and self._ends_at_eos:
                    return tokens[: i + 1], "stop"
                continue
            if not is_end and not grammar.push(token):
                msg = f"The grammar refuses token {token}, which its own mask allowed. Please report this."
                raise DecodingError(msg)
            if grammar.finished or (is_end and self._ends_at_eos):
                tokens, reason = tokens[: i + 1], "stop"
            if (
                grammar.finished or is_end
            ):  # one that had to be completed early was cut by the length
                return tokens, "length" if grammar.is_closing else reason
        return tokens, reason
