"""The target drafts over a part of its own keys and values: no second model, no second prefill.

The part is a pattern: the retrieved chunks (RetroLM's pages, arXiv 2502.11444, as TriForce's draft cache, arXiv
2404.11912), a sink and a window (StreamingLLM's cache, LongSpec's constant memory, arXiv 2502.17421), or power-of-two
distances (PowerAttention, arXiv 2503.03588). A draft step saves only the attention over the other positions: with a
small model or a short prompt it costs nearly a step of the target (docs/explanation/experiments.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch

from rasd_integrations.config import check_value
from rasd_integrations.drafters.base import Drafter, Helper, Needs
from rasd_integrations.drafters.chain import ChainSession
from rasd_integrations.drafters.papers.gathered_kv import GatheredKV
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.types import Draft, DraftContext, TokenBlock

Pattern = Literal["chunks", "window", "power"]
RowRange = tuple[int, int]
"""First row, and the one after the last."""

_ANCHOR = 8  # equal tokens in a row that locate a piece of a chunk
_BORDER = 2  # tokens on either side of it that may have merged with their neighbours
_LEAST_SAVING = 2  # drafts only if the prompt has this many times the rows that are read
_FRESH = 64  # committed tokens after which the rows are chosen again


class SparseKVDrafter(Drafter):
    """Drafts chains with the target's own weights over some of its own keys and values.

    They are copied from the target's buffer, which computed them over the whole text. ``start`` takes a helper, so
    :class:`CascadeDrafter` can draft for it.
    """

    name = "sparse_kv"

    def __init__(
        self,
        pattern: Pattern = "chunks",
        *,
        max_rows: int = 1024,
        sink: int = 64,
        window: int | None = None,
        confidence: float = 0.1,
    ) -> None:
        """Choose what is read: the sink and the window first, then what the pattern adds.

        Args:
            pattern: ``"chunks"`` adds the end of the prompt and the retrieved chunks, best first, and drafts nothing
                if none is in the prompt; ``"power"`` adds rows at distances 1, 2, 4, 8, ... from the last ones;
                ``"window"`` adds nothing.
            max_rows: Maximum rows, at least ``sink + window``; up to 64 new tokens are added to them.
            sink: First rows of the prompt: its instruction, and the attention sink.
            window: Last rows of the text, at least 1; ``None`` is the rest of ``max_rows`` for ``"window"``, else a
                quarter of it.
            confidence: A drafted token less likely than this, 0 to 1, ends the draft. It stays in the draft, since
                dropping a token after its draw would bias the output.

        Raises:
            ConfigurationError: An unknown pattern, or a value out of its range.
        """
        if window is None:
            window = max((max_rows - sink) // (1 if pattern == "window" else 4), 1)
        for option, value, ok, limit in (
            ("pattern", pattern, pattern in get_args(Pattern), f"one of {get_args(Pattern)}"),
            ("sink", sink, sink >= 0, "at least 0"),
            ("window", window, window >= 1, "at least 1"),
            ("max_rows", max_rows, max_rows >= sink + window, f"at least sink + window, {sink + window}"),
            ("confidence", confidence, 0 <= confidence <= 1, "in 0..1"),
        ):  # fmt: skip
            check_value(ok, option, value, limit)
        self.pattern = pattern
        self.needs = Needs(prompt=pattern == "chunks")
        self.max_rows = max_rows
        self.sink = sink
        self.window = window
        self.confidence = confidence

    def start(self, context: DraftContext, helper: Helper | None = None) -> SparseKVSession:
        """Start an answer; ``helper`` drafts for this drafter."""
        return SparseKVSession(self, self._layout(context), context, helper)

    def _layout(self, context: DraftContext) -> _Layout | None:
        """Return what to read for this prompt; ``None`` if too little can be left out."""
        prompt, most = context.prompt_ids, len(context.prompt_ids) // _LEAST_SAVING
        if self.sink + self.window > most:
            return None
        fixed: list[RowRange] = [(0, self.sink)]
        if self.pattern == "chunks":
            pieces = find_pieces(prompt, context.chunk_ids)
            if not pieces:
                return None
            fixed += [(len(prompt) - self.window, len(prompt)), *pieces]
        layout = _Layout(tuple(fixed), self.window, self.max_rows, power=self.pattern == "power")
        return layout if len(layout.rows(len(prompt))) <= most else None


class SparseKVSession(ChainSession):
    """State of one answer: the target over a subset of its KV."""

    def __init__(
        self,
        drafter: SparseKVDrafter,
        layout: _Layout | None,
        context: DraftContext,
        helper: Helper | None,
    ) -> None:
        """Made by :meth:`SparseKVDrafter.start`; without a layout only the helper drafts."""
        super().__init__(drafter.name, context, drafter.confidence, helper)
        self._layout = layout
        self._last = context.prompt_ids[-1]
        self._live: KVBuffer | None = None
        self._rows: GatheredKV | None = None
        self._chosen_at = 0  # length of the live buffer when the rows were chosen
        self._seen = 0  # length of the live buffer that the gathered rows cover
        self._own = 0  # gathered rows without guesses

    def attach(self, target: TargetModel, buffer: KVBuffer) -> None:
        """Receive the model and its keys and values.

        Raises:
            ConfigurationError: Layers keep recurrent states.
        """
        target.check_stateless("Drafting over a part of the text")
        if self._layout is not None:
            self._model, self._live = target, buffer

    @torch.inference_mode()
    def propose(self, budget: int) -> Draft:
        """Return a chain of at most ``budget`` tokens."""
        if self._live is None or self._layout is None:
            return self._fallback(budget)
        return self._chain(self._current(self._live, self._layout), [self._last], budget)

    def observe(self, block: TokenBlock) -> None:
        """Advance over what the target committed."""
        self._last = block.token_ids[-1]
        super().observe(block)

    def close(self) -> None:
        """Free the rows."""
        self._live = self._rows = None
        super().close()

    def _current(self, live: KVBuffer, layout: _Layout) -> GatheredKV:
        """Return the gathered rows without guesses, extended by what the target has committed since."""
        rows = self._rows
        if rows is None or live.length - self._chosen_at > _FRESH:
            chosen = layout.rows(live.length)
            rows = self._rows = GatheredKV(live, chosen, len(chosen) + 2 * _FRESH)
            self._chosen_at = live.length
        else:
            rows.truncate(self._own)
            rows.extend(live, self._seen, live.length)
        self._seen, self._own = live.length, rows.length
        return rows


class _Layout:
    """Chooses rows of a text of any length."""

    def __init__(self, fixed: Sequence[RowRange], window: int, most: int, *, power: bool) -> None:
        """Read the ``fixed`` ranges, best first, the last ``window`` rows and, with ``power``, rows between."""
        self._fixed = fixed
        self._window = window
        self._most = most
        self._power = power

    def rows(self, length: int) -> list[int]:
        """Return the rows to read of ``length``, ascending, at most ``most``."""
        sink, *others = self._fixed
        spans = [sink, (length - self._window, length), *others]
        if self._power:
            spans += self._powers(length, self._most - self._window - sink[1])
        chosen = np.zeros(length, dtype=bool)
        for start, end in spans:
            new = np.arange(max(start, 0), min(end, length))
            new = new[~chosen[new]]
            chosen[new[: self._most - int(chosen.sum())]] = True
        rows: list[int] = np.flatnonzero(chosen).tolist()
        return rows

    def _powers(self, length: int, room: int) -> list[RowRange]:
        """Return ranges of equal width at power-of-two distances from the end, ``room`` rows in all."""
        ends = [length - (1 << k) for k in range(length.bit_length()) if 1 << k >= self._window]
        width = room // max(len(ends), 1)
        return [(end - width, end) for end in ends]


def find_pieces(prompt_ids: Sequence[int], chunk_ids: Sequence[Sequence[int]]) -> list[RowRange]:
    """Return the row ranges of the chunks in the prompt, in the chunks' order.

    A chunk's borders may have merged with its neighbours, and it may be there in pieces: runs of 8 equal tokens or more
    are found, each at its first occurrence, and taken with 2 tokens on either side.
    """
    prompt = tuple(prompt_ids)
    firsts: dict[tuple[int, ...], int] = {}
    for i in range(len(prompt) - _ANCHOR + 1):
        firsts.setdefault(prompt[i : i + _ANCHOR], i)
    spans: list[RowRange] = []
    for chunk in map(tuple, chunk_ids):
        i = 0
        while i <= len(chunk) - _ANCHOR:
            at = firsts.get(chunk[i : i + _ANCHOR])
            if at is None:
                i += 1
                continue
            n = _ANCHOR
            while chunk[i + n : i + n + 1] == prompt[at + n : at + n + 1] != ():
                n += 1
            spans.append((max(at - _BORDER, 0), min(at + n + _BORDER, len(prompt))))
            i += n
    return spans
