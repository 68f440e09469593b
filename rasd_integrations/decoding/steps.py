"""How an answer's steps are run: as is quickest, or so that every number in them can be had again.

The bits of a row of a matrix product depend on how many rows the product has, and those of attention on how many
keys stand before the step's own. So the same token gets other logits with a draft behind it, with other answers in
the step, or behind a cached prefix: by a rounding, which decides where two tokens are equally likely.
:class:`FixedSteps` runs a token always among the same rows: those of its window of positions. What the rows behind
it hold does not matter to a causal model, so there the draft stands, or padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Protocol

import torch
from torch import Tensor

from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft

WIDTH = 8  # positions of a decoding step under deterministic=True; a draft ends where they do
PIECE = 128  # of a prefill's step; a multiple of WIDTH
_PADDING = 0  # an id that every model knows


class Steps(Protocol):
    """What the decoder asks of a target.

    Attributes:
        is_fixed: Whether each step has the rows that its positions say.
        row_multiple: Step widths are ``1 + k * row_multiple``; above 1 if changing the width costs time.
    """

    is_fixed: bool
    row_multiple: int

    def fresh_seed(self) -> int:
        """Return the seed of an answer that is given none."""
        ...

    def prefill(self, ids: Sequence[int], buffer: KVBuffer, *, first: bool) -> Iterator[Tensor]:
        """Append rows of the prompt ``ids``, those that are not there; let others have turns in between.

        With ``first`` all of them, and the last yield is the logits ``[1, vocab]`` that predict the first token.
        """
        ...

    def kept(self, rows: int) -> int:
        """Return how many of a prefill's ``rows`` other answers may reuse."""
        ...

    def room(self, length: int) -> int:
        """Return the most drafted tokens of the step behind ``length`` tokens."""
        ...

    def fitted(self, draft: Draft) -> Draft:
        """Return what of a draft can be verified."""
        ...

    def step(self, ids: Sequence[int], draft: Draft, buffer: KVBuffer, rows: int) -> Tensor:
        """Run the last of ``ids`` and the draft behind it; commit nothing new.

        Returns:
            Logits ``[1 + len(draft), vocab]``; the rows lie in the buffer's spare room in the same order.
        """
        ...


class FreeSteps:
    """Steps of any shape: trees, any number of rows, several answers in one forward."""

    is_fixed = False

    def __init__(self, target: TargetModel) -> None:
        """Run steps of ``target``."""
        self._target = target
        self.row_multiple = target.row_multiple

    def fresh_seed(self) -> int:
        """Return another one each time."""
        return random.getrandbits(63)

    def prefill(self, ids: Sequence[int], buffer: KVBuffer, *, first: bool) -> Iterator[Tensor]:
        """Do as :meth:`Steps.prefill` says."""
        rest = ids[buffer.length : len(ids) - (not first)]
        return self._target.prefill(rest, buffer, num_logits=int(first))

    def kept(self, rows: int) -> int:
        """Return all that there can be: those of the answer may be reused, too."""
        return self._target.window

    def room(self, length: int) -> int:
        """Return what the window leaves."""
        return self._target.window - length

    def fitted(self, draft: Draft) -> Draft:
        """Return the draft."""
        return draft

    def step(self, ids: Sequence[int], draft: Draft, buffer: KVBuffer, rows: int) -> Tensor:
        """Do as :meth:`Steps.step` says, as ``rows`` rows at least."""
        parents = None if draft.is_chain else draft.parents
        return self._target.step([ids[-1], *draft.token_ids], buffer, parents, rows=rows)


class FixedSteps:
    """Steps whose rows follow from positions alone, so that a row's bits follow from the tokens up to it alone.

    A prefill runs whole pieces of :data:`PIECE` positions, up to the window of :data:`WIDTH` positions in which the
    prompt's last token lies. A decoding step runs all positions of the window that its last token lies in, those
    before it once more. Steps of several answers never share a forward.
    """

    is_fixed = True
    row_multiple = 1

    def __init__(self, target: TargetModel) -> None:
        """Run steps of ``target``, once it was seen that their numbers can be had again.

        Raises:
            ConfigurationError: What stands behind a token changes its numbers.
        """
        self._target = target
        self._check()

    def fresh_seed(self) -> int:
        """Return the same one each time."""
        return 0

    def prefill(self, ids: Sequence[int], buffer: KVBuffer, *, first: bool = False) -> Iterator[Tensor]:  # fmt: skip
        """Append rows up to the window of the last of ``ids``, whose logits come with the first step."""
        end = _start(len(ids) - 1, WIDTH)
        while buffer.length < end:
            start = _start(buffer.length, PIECE)
            buffer.truncate(start)
            logits = self._run(ids[start : start + PIECE], PIECE, buffer, 0)
            buffer.commit(range(min(end - start, PIECE)))
            yield logits

    def kept(self, rows: int) -> int:
        """Return the rows of whole pieces, where every later prefill begins."""
        return _start(rows, PIECE)

    def room(self, length: int) -> int:
        """Return how many positions the window has behind its last token."""
        return WIDTH - 1 - (length - 1) % WIDTH

    def fitted(self, draft: Draft) -> Draft:
        """Return the most likely path of a draft: a token of a tree has another place than its position's."""
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

    def step(self, ids: Sequence[int], draft: Draft, buffer: KVBuffer, rows: int = 0) -> Tensor:
        """Do as :meth:`Steps.step` says; where it fails, the buffer ends at the window's first position."""
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
        """See that neither a piece nor a window gives a token other bits where other tokens stand behind it."""
        config = self._target.model.config.get_text_config()
        name = type(self._target.model).__name__
        if any("expert" in key and isinstance(n, int) and n > 1 for key, n in vars(config).items()):
            msg = (
                f"deterministic=True, but {name} sends tokens to experts in groups whose sizes depend on the other "
                f"tokens of a step, and so do its roundings. Use deterministic=False, or a dense model."
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
                    f"deterministic=True, but {name} gives a token other numbers where other tokens stand behind it "
                    f"in the same step, so that drafts would change them. Use deterministic=False, or another "
                    f"executor."
                )
                raise ConfigurationError(msg)


def roundings(target: TargetModel) -> str:
    """Return what the bits of fixed steps depend on besides the weights: how and where they run."""
    engine = version("openvino") if "Compiled" in target.executor_name else ""
    where = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return "-".join(
        map(str, (WIDTH, PIECE, target.executor_name, torch.__version__, engine, *where))
    )


def _start(position: int, size: int) -> int:
    """Return the first position of the stretch of ``size`` that ``position`` lies in."""
    return position - position % size
