"""Runs an answer's steps: as fast as possible, or reproducibly to the bit.

How a matrix product rounds depends on its number of rows, and attention on the number of keys before the step. So a
token's logits differ by a rounding with a draft after it, with other answers in the step, or after a cached prefix,
which decides between two equally likely tokens. :class:`FixedSteps` runs a token always among the same rows, those of
its window of positions. A causal model ignores what comes after a token, so the draft goes there, or padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft

_MOST_AGAIN = 8  # tokens of a step that were accepted before
WIDTH = 8  # positions of a decoding step under deterministic=True; a draft ends with them
PIECE = 128  # of a prefill's step; a multiple of WIDTH
_PADDING = 0  # an id that every model knows


class Steps:
    """Steps of any shape: trees, any width, several answers in one forward.

    Attributes:
        is_fixed: The rows of each step follow from its positions alone.
        row_multiple: Step widths are ``1 + k * row_multiple``; above 1 if changing the width costs time.
    """

    is_fixed = False

    def __init__(self, target: TargetModel) -> None:
        """Run steps of ``target``."""
        self._target = target
        self.row_multiple = target.layout.row_multiple

    def fresh_seed(self) -> int:
        """Return the seed of an answer without one."""
        return random.getrandbits(63)

    def prefill(self, ids: Sequence[int], buffer: KVBuffer, *, first: bool) -> Iterator[Tensor]:
        """Append the positions of the prompt ``ids`` that the buffer lacks.

        Other answers run between yields. With ``first`` all positions, and the last yield is the logits
        ``[1, vocab]`` of the first token.
        """
        rest = ids[buffer.length : len(ids) - (not first)]
        return self._target.prefill(rest, buffer, num_logits=int(first))

    def kept(self, length: int) -> int:
        """Return how many positions are reusable after a prefill of ``length``."""
        return self._target.window

    def room(self, length: int) -> int:
        """Return the longest draft of a step after ``length`` tokens: none passes the longrope border."""
        border = self._target.long_rope_border
        end = border if border is not None and length <= border else self._target.window
        return end - length

    def fitted(self, draft: Draft) -> Draft:
        """Return the part of a draft that can be verified: a chain, where layers keep a recurrent state."""
        return best_path(draft) if self._target.keeps_states else draft

    def step(self, ids: Sequence[int], draft: Draft, buffer: KVBuffer, rows: int) -> Tensor:
        """Run the last of ``ids`` and ``draft``, padded to ``rows``; commit nothing new.

        Where layers keep a recurrent state, tokens accepted since the buffer's end run once more, before these.

        Returns:
            Logits ``[1 + len(draft), vocab]``; keys and values are in the buffer's spare room in the same order.
        """
        parents = None if draft.is_chain else draft.parents
        again = len(ids) - 1 - buffer.length if self._target.keeps_states else 0
        if again > _MOST_AGAIN:
            self._target.step(ids[buffer.length : -1], buffer)
            buffer.commit(range(again))
            again = 0
        unread = ids[len(ids) - 1 - again :]
        logits = self._target.step([*unread, *draft.token_ids], buffer, parents, rows=rows)
        if again:
            buffer.commit(range(again))
        return logits[again:]

    def step_both(
        self,
        ids: Sequence[int],
        buffer: KVBuffer,
        other: Steps,
        other_ids: Sequence[int],
        other_buffer: KVBuffer,
        draft: Draft,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        """Run :meth:`step` with one ``draft`` behind two texts, the second by ``other``."""
        shares = other._target is self._target and not (self.is_fixed or self._target.keeps_states)
        if not shares or len(draft) or rows > 1:
            first = self.step(ids, draft, buffer, rows)
            return first, other.step(other_ids, draft, other_buffer, rows)
        return self._target.step_both(ids[-1:], buffer, other_ids[-1:], other_buffer)


class FixedSteps(Steps):
    """Steps in which a token's bits depend only on the tokens up to it.

    A prefill runs whole pieces of :data:`PIECE` positions, up to the window of :data:`WIDTH` positions that holds the
    prompt's last token. A decoding step runs all positions of its last token's window, those before it once more.
    Steps of several answers never share a forward.
    """

    is_fixed = True

    def __init__(self, target: TargetModel) -> None:
        """Check that steps of ``target`` are reproducible.

        Raises:
            ConfigurationError: Tokens after another one change its numbers.
        """
        super().__init__(target)
        self.row_multiple = 1
        self._check()

    def fresh_seed(self) -> int:
        """Return 0."""
        return 0

    def prefill(self, ids: Sequence[int], buffer: KVBuffer, *, first: bool = False) -> Iterator[Tensor]:  # fmt: skip
        """Append positions up to the last window, whose logits come with the first step."""
        end = _start(len(ids) - 1, WIDTH)
        while buffer.length < end:
            start = _start(buffer.length, PIECE)
            buffer.truncate(start)
            logits = self._run(ids[start : start + PIECE], PIECE, buffer, 0)
            buffer.commit(range(min(end - start, PIECE)))
            yield logits

    def kept(self, length: int) -> int:
        """Return the length of whole pieces, where every later prefill begins."""
        return _start(length, PIECE)

    def room(self, length: int) -> int:
        """Return the number of positions left in the last token's window."""
        return WIDTH - 1 - (length - 1) % WIDTH

    def fitted(self, draft: Draft) -> Draft:
        """Return the most likely path, to be verified with plain decoding's draws."""
        path = best_path(draft)
        return path if path.probs is None else replace(path, probs=None)

    def step(self, ids: Sequence[int], draft: Draft, buffer: KVBuffer, rows: int = 0) -> Tensor:
        """Run the window; if that fails, the buffer ends at its first position."""
        last = len(ids) - 1
        start = _start(last, WIDTH)
        buffer.truncate(start)
        window = [*ids[start:], *draft.token_ids]
        logits = self._run(window, WIDTH, buffer, WIDTH)
        buffer.commit(range(last - start))  # the same bits as before
        return logits[last - start : len(window)]

    def _run(self, ids: Sequence[int], rows: int, buffer: KVBuffer, num_logits: int) -> Tensor:
        padded = [*ids, *[_PADDING] * (rows - len(ids))]
        return self._target.run_alone(padded, buffer, num_logits=num_logits)

    @torch.inference_mode()
    def _check(self) -> None:
        """Check that a token's bits do not depend on the tokens after it."""
        self._target.check_stateless("deterministic=True")
        config = self._target.model.config.get_text_config()
        name = type(self._target.model).__name__
        if any("expert" in key and isinstance(n, int) and n > 1 for key, n in vars(config).items()):
            msg = (
                f"deterministic=True, but {name} sends tokens to experts in groups whose sizes depend on the other "
                f"tokens of a step, and so do its roundings. Use deterministic=False, or a dense model."
            )
            raise ConfigurationError(msg)
        border = self._target.long_rope_border or 0
        if border % PIECE:
            msg = (
                f"deterministic=True, but {name} reads texts of more than {border} tokens with other rotary angles, "
                f"and {border} is no multiple of the {PIECE} tokens of a step. Use deterministic=False."
            )
            raise ConfigurationError(msg)
        ids = (97 * torch.arange(1, PIECE + 1) % self._target.vocab_size).tolist()
        for rows in (PIECE, WIDTH):
            seen: list[Tensor] = []
            for tail in (ids[rows // 2 : rows], ids[: rows // 2], []):
                buffer = KVBuffer(PIECE)
                half = [*ids[: rows // 2], *tail]
                logits = self._run(half, rows, buffer, rows if rows == WIDTH else 0)
                buffer.commit(range(rows // 2))
                pairs = [buffer.rows(layer, 0, rows // 2) for layer in range(buffer.num_layers)]
                flat = [logits[: rows // 2], *(part for pair in pairs for part in pair)]
                seen.append(torch.cat([part.flatten().view(torch.uint8).cpu() for part in flat]))
            if not all(torch.equal(seen[0], other) for other in seen[1:]):
                msg = (
                    f"deterministic=True, but {name} gives a token other numbers if other tokens follow it "
                    f"in the same step, so that drafts would change them. Use deterministic=False, or another "
                    f"executor."
                )
                raise ConfigurationError(msg)


def best_path(draft: Draft) -> Draft:
    """Return the chain of each node's most likely child."""
    if draft.is_chain:
        return draft
    best: dict[int, int] = {}
    for node, parent in enumerate(draft.parent_of):
        rival = best.setdefault(parent, node)
        if draft.node_probs is not None and draft.node_probs[node] > draft.node_probs[rival]:
            best[parent] = node
    path, node = list[int](), -1
    while (node := best.get(node, -1)) >= 0:
        path.append(node)
    return replace(
        draft,
        token_ids=tuple(draft.token_ids[node] for node in path),
        parents=None,
        sources=None if draft.sources is None else tuple(draft.sources[node] for node in path),
        node_probs=None
        if draft.node_probs is None
        else tuple(draft.node_probs[node] for node in path),
    )


def roundings(target: TargetModel) -> str:
    """Return what the bits depend on besides weights: executor, libraries, processor."""
    where = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return "-".join(map(str, (WIDTH, PIECE, target.executor_name, torch.__version__, *where)))


def _start(position: int, size: int) -> int:
    """Return the first position of the stretch of ``size`` that holds ``position``."""
    return position - position % size
