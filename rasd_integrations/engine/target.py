"""The target model: owns the weights and runs one step, whatever the executor."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import Segment, StepContext
from rasd_integrations.engine.device import to_device
from rasd_integrations.engine.executors.base import Drawn, Executor, Sampler
from rasd_integrations.engine.executors.eager import EagerExecutor, input_device
from rasd_integrations.engine.kv.buffer import KVBuffer, KVLayout
from rasd_integrations.engine.kv.prefix_cache import Lease, PrefixCache
from rasd_integrations.engine.kv.state import MOST_KEPT
from rasd_integrations.engine.long_rope import has_joint_rope, long_rope_border
from rasd_integrations.engine.step_queue import StepQueue
from rasd_integrations.engine.verification.sampling import uniform_numbers
from rasd_integrations.errors import (
    ConfigurationError,
    DeviceMemoryError,
    PromptError,
    PromptTooLongError,
)

PREFILL_PIECE = 512  # tokens; on a GPU four times as many keep it busy
_LONG_ROPE = "\x00long"  # behind a namespace, which a user cannot write
_BATCH_ROWS = 64  # more rows cost as much together as apart


@dataclass(frozen=True, slots=True)
class _Work:
    """One answer's part of a step: ``tokens`` ``[n]`` behind its prefix."""

    tokens: Tensor
    segment: Segment
    num_logits: int
    rows: int = 0
    draw: Callable[[], Drawn] | None = None  # instead of a step; never part of a batch


class TargetModel:
    """A causal language model: token ids in, logits out, keys and values in a buffer.

    Also runs model drafters. Threads may step at the same time, each with a buffer of its own: they take turns, and
    waiting decode steps run as one batch.

    Attributes:
        window: Longest sequence, in tokens.
        long_rope_border: Longest text with short rotary factors, in tokens; ``None`` without longrope.
        vocab_size: Width of the logits.
        eos_ids: Ids that end an answer.
        kv_bytes_per_token: Bytes of one token's keys and values.
        state_bytes: Bytes of the recurrent states that an answer keeps, whatever its length.
        hidden_size: Width of a final hidden state.
        hidden_bytes_per_token: Bytes of one token's final hidden state.
    """

    def __init__(self, model: PreTrainedModel, *, executor: Executor | None = None) -> None:
        """Wrap ``model``, which is not changed: executors run copies of its modules over the same weights.

        Raises:
            ConfigurationError: The architecture cannot run speculative steps.
        """
        config = model.config.get_text_config()
        self.model = model
        self.device = input_device(model)
        self._executor = executor or EagerExecutor(model)
        self.window = int(config.max_position_embeddings)
        self.long_rope_border = long_rope_border(config)
        self.vocab_size = int(config.vocab_size)
        self.eos_ids = _eos_ids(model)
        self.hidden_size = self.layout.hidden_size
        self.hidden_bytes_per_token = self.hidden_size * model.dtype.itemsize
        # Tokens of a prefill piece: alone, and while others decode (docs/explanation/experiments.md).
        on_cpu = self.device.type == "cpu"
        self._pieces = (PREFILL_PIECE, 64) if on_cpu else (4 * PREFILL_PIECE, PREFILL_PIECE)
        if self.layout.one_by_one:
            self._pieces = self.window, self.window
        elif self.keeps_states:  # later prompts go on from the ends of pieces
            self._pieces = PREFILL_PIECE // 2, min(self._pieces[1], PREFILL_PIECE // 2)
        rows = 1 if self.keeps_states or has_joint_rope(config) else _BATCH_ROWS
        self._turns = StepQueue[tuple[_Work, ...], Any](partial(_forward, self._executor), rows)
        self.kv_bytes_per_token = self.layout.row_nbytes
        self.state_bytes = (MOST_KEPT + 2) * self.layout.state_nbytes

    @property
    def is_sharded(self) -> bool:
        """True if several processes run each step together (transformers' ``tp_plan``)."""
        return (getattr(self.model, "tp_size", None) or 1) > 1

    @property
    def max_batch_rows(self) -> int:
        """Most tokens in one batch; 1 turns batching off."""
        return self._turns.max_rows

    @max_batch_rows.setter
    def max_batch_rows(self, rows: int) -> None:
        self._turns.max_rows = rows

    @property
    def is_contended(self) -> bool:
        """True if another thread is decoding."""
        return self._turns.is_contended

    def leave(self) -> None:
        """Mark this thread's answer as finished, so that other steps stop waiting for it."""
        self._turns.leave()

    @property
    def layout(self) -> KVLayout:
        """How its executor keeps keys and values, and step widths."""
        return self._executor.layout

    @property
    def keeps_states(self) -> bool:
        """True if some layers keep a recurrent state: drafts are chains, and answers never share a forward."""
        return self.layout.state_nbytes > 0

    def check_stateless(self, what: str) -> None:
        """Raise ``ConfigurationError`` if layers keep a recurrent state, over which ``what`` cannot run."""
        if self.keeps_states:
            msg = (
                f"{what} needs keys and values of all layers, but some of {type(self.model).__name__} keep a "
                f"recurrent state. Leave it out, or use a model of attention layers only."
            )
            raise ConfigurationError(msg)

    @property
    def shares_weights(self) -> bool:
        """True if steps read the model's own parameters, so that a change of them shows."""
        return self._executor.shares_weights

    @property
    def executor_name(self) -> str:
        """Its class and version, which decide how steps are rounded."""
        return self._executor.name

    def check_prompt(self, ids: Sequence[int], max_tokens: int) -> None:
        """Raise unless the prompt and ``max_tokens`` fit the context window.

        Raises:
            PromptError: It is empty or holds an id that the model does not know.
            PromptTooLongError: Prompt and answer exceed the window.
        """
        if not ids:
            msg = "The prompt has no tokens. Give it at least one character of text."
            raise PromptError(msg)
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            msg = f"A prompt id is outside 0..{self.vocab_size - 1}. Use this model's tokenizer."
            raise PromptError(msg)
        if len(ids) + max_tokens > self.window:
            raise PromptTooLongError(len(ids), max_tokens, self.window)

    def is_long(self, ids: Sequence[int]) -> bool:
        """Return True if the model reads a text of ``ids`` with long rotary factors."""
        return self.long_rope_border is not None and len(ids) > self.long_rope_border

    def lease(
        self,
        cache: PrefixCache,
        ids: Sequence[int],
        capacity: int,
        namespace: str,
        keeps_hidden: bool = False,
    ) -> Lease:
        """Return :meth:`PrefixCache.lease` for ``ids``; texts on either side of the longrope border share nothing."""
        cache = PrefixCache(0) if self.layout.one_by_one else cache
        side = namespace + _LONG_ROPE if (long := self.is_long(ids)) else namespace
        lease = cache.lease(ids, capacity, side, keeps_hidden=keeps_hidden)
        lease.buffer.long_rope = long
        return lease

    def prefill(
        self, ids: Sequence[int], buffer: KVBuffer, *, num_logits: int = 0
    ) -> Iterator[Tensor]:
        """Append the keys and values of ``ids`` to ``buffer``, piece by piece.

        Yields:
            Logits ``[num_logits, vocab]`` (0 or 1) after the last piece, ``[0, vocab]`` after earlier ones. Other
            threads have turns in between.

        Raises:
            DeviceMemoryError: The device's memory is full; the buffer holds what was appended before.
        """
        done = 0
        while done < len(ids):
            size = self._pieces[self.is_contended]
            # A short rest does not pay for a forward of its own.
            if len(ids) - done < 2 * size and not self.keeps_states:
                size = len(ids) - done
            piece = ids[done : done + size]
            done += len(piece)
            work = self._prepared(piece, None, buffer, num_logits * (done == len(ids)))
            (logits,) = self._turns.submit((work,), len(piece), alone=True)
            buffer.commit(range(len(piece)))
            if self.keeps_states:
                buffer.snapshots.keep(buffer.length)
            yield logits

    def step(
        self,
        ids: Sequence[int],
        buffer: KVBuffer,
        parents: Sequence[int] | None = None,
        *,
        rows: int = 0,
    ) -> Tensor:
        """Run ``ids`` behind the committed tokens; commit nothing.

        Args:
            ids: The last token, which is not in the buffer yet, and the draft.
            buffer: The prefix; afterwards its spare room holds the new keys and values for :meth:`KVBuffer.commit`.
            parents: Parent of each drafted token, -1 the last token; ``None`` is a chain.
            rows: Pad the step to at least this width (a change of width is expensive on some executors).

        Returns:
            Logits ``[len(ids), vocab]``.

        Raises:
            DeviceMemoryError: The device's memory is full; the buffer is as it was.
        """
        work = self._prepared(ids, parents, buffer, len(ids), rows)
        logits: Tensor = self._turns.submit((work,), len(ids))[0]
        return logits

    def step_both(
        self, one: Sequence[int], buffer: KVBuffer, other: Sequence[int], other_buffer: KVBuffer
    ) -> tuple[Tensor, Tensor]:
        """Run :meth:`step` for two chains, as one forward where the model can.

        The weights are read once: two tokens over 5,000 and 850 take 0.65 of two steps' time on a CPU, but chains of
        nine as long as apart (docs/explanation/experiments.md).
        """
        if len(one) + len(other) <= self.max_batch_rows:
            pairs = (one, buffer), (other, other_buffer)
            works = tuple(self._prepared(ids, None, kept, len(ids)) for ids, kept in pairs)
            try:
                first, second = self._turns.submit(works, len(one) + len(other))
            except Exception:  # noqa: BLE001, S110  (as the queue does with a batch: each by itself tells what is wrong)
                pass
            else:
                return first, second
        return self.step(one, buffer), self.step(other, other_buffer)

    def run_alone(self, ids: Sequence[int], buffer: KVBuffer, *, num_logits: int) -> Tensor:
        """Run exactly ``ids`` behind the committed tokens, never in a batch; commit nothing.

        Keys lie so that strides do not depend on the capacity; positions are cut to the window.

        Returns:
            Logits ``[num_logits, vocab]``; ``num_logits`` is all or 0.

        Raises:
            DeviceMemoryError: The device's memory is full; the buffer is as it was.
        """
        buffer.lay(self.layout.order.fixed)
        work = self._prepared(ids, None, buffer, num_logits)
        logits: Tensor = self._turns.submit((work,), len(ids), alone=True)[0]
        return logits

    def draw(
        self,
        ids: Sequence[int],
        buffer: KVBuffer,
        n: int,
        sampler: Sampler,
        generator: torch.Generator,
    ) -> Drawn | None:
        """Run ``ids``, then draw tokens one after another on the device; commit nothing.

        Args:
            ids: The last tokens, which are not in the buffer yet.
            buffer: The prefix; afterwards its spare room holds ``ids`` and all drawn tokens but the last.
            n: How many at most; at least 1.
            sampler: How a token is drawn.
            generator: On the CPU; one number for each token.

        Returns:
            ``None``, with the generator unchanged, if the executor cannot.

        Raises:
            DeviceMemoryError: The device's memory is full; the buffer is as it was.
        """
        n = min(n, self._executor.max_drawn(buffer, len(ids)))
        if n == 0:
            return None
        work = self._prepared(ids, None, buffer, 1, spare=n - 1)
        numbers = to_device(uniform_numbers((n,), generator), self.device)
        draw = partial(self._executor.draw, work.tokens, work.segment, sampler, numbers)
        drawn: Drawn = self._turns.submit((replace(work, draw=draw),), len(ids), alone=True)[0]
        return drawn

    @torch.inference_mode()
    def _prepared(
        self,
        ids: Sequence[int],
        parents: Sequence[int] | None,
        buffer: KVBuffer,
        num_logits: int,
        rows: int = 0,
        spare: int = 0,
    ) -> _Work:
        """Prepare one answer's inputs in its own thread, so that an error hits only that answer."""
        with _memory_errors(len(ids), buffer, self.device):
            buffer.reserve(len(ids) + spare)
            positions, mask = self._layout(len(ids), parents, buffer.next_position)
            tokens = to_device(torch.tensor(ids, dtype=torch.long), self.device)
            return _Work(tokens, Segment(buffer, positions, mask), num_logits, rows)

    def _layout(
        self, n: int, parents: Sequence[int] | None, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return positions ``[n]`` and the ancestor mask ``[n, n]`` (``None`` for a chain)."""
        if parents is None:
            positions = torch.arange(length, length + n, device=self.device)
            return positions.clamp_(max=self.window - 1), None
        depth, mask = [0], np.eye(n, dtype=np.bool_)
        for node, parent in enumerate(parents, start=1):
            depth.append(depth[parent + 1] + 1)
            mask[node, : parent + 2] = mask[parent + 1, : parent + 2]
        positions = torch.tensor(depth) + length
        return to_device(positions, self.device), to_device(torch.from_numpy(mask), self.device)


@torch.inference_mode()
def _forward(executor: Executor, turns: Sequence[tuple[_Work, ...]]) -> Sequence[tuple[Any, ...]]:
    """Run one forward for the works of all ``turns`` and return the logits of each, or what one drew."""
    results = iter(_results(executor, [work for works in turns for work in works]))
    return [tuple(next(results) for _ in works) for works in turns]


def _results(executor: Executor, works: Sequence[_Work]) -> Sequence[Any]:
    segments = tuple(work.segment for work in works)
    if len(works) == 1:
        work, segment = works[0], segments[0]
        with _memory_errors(segment.rows, segment.buffer, segment.positions.device):
            if work.draw is not None:
                return [work.draw()]
            context = StepContext(segment.positions, segments, work.rows)
            out = executor.step(work.tokens, context, num_logits=work.num_logits)
            _keep_hidden(segments, out.hidden)
            return [out.logits]
    tokens = torch.cat([work.tokens for work in works])
    context = StepContext(torch.cat([s.positions for s in segments]), segments)
    out = executor.step(tokens, context, num_logits=len(tokens))
    _keep_hidden(segments, out.hidden)
    return torch.split(out.logits, [s.rows for s in segments])


def _keep_hidden(segments: Sequence[Segment], hidden: Tensor) -> None:
    """Write the final hidden states to the buffers that keep them."""
    parts = torch.split(hidden, [s.rows for s in segments])
    for segment, part in zip(segments, parts, strict=True):
        if segment.buffer.keeps_hidden:
            segment.buffer.write_hidden(part)


_NO_MEMORY = re.compile(r"can't alloc|cannot allocate memory|bad_alloc", re.IGNORECASE)


@contextmanager
def _memory_errors(n: int, buffer: KVBuffer, device: torch.device) -> Iterator[None]:
    """Raise `DeviceMemoryError` for a step of ``n`` tokens if memory runs out."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as err:
        raise _out_of_memory(n, buffer, device) from err
    except (
        RuntimeError
    ) as err:  # the CPU allocators of torch and OpenVINO have no type of their own
        if not _NO_MEMORY.search(str(err)):
            raise
        raise _out_of_memory(n, buffer, device) from err


def _out_of_memory(n: int, buffer: KVBuffer, device: torch.device) -> DeviceMemoryError:
    msg = (
        f"A step of {n} tokens over {buffer.length} cached ones does not fit in the memory of "
        f"{device} (keys and values: {buffer.nbytes / 2**20:.0f} MiB). Shorten the prompt, lower "
        f"prefix_cache_bytes, or load the model in a smaller dtype."
    )
    return DeviceMemoryError(msg)


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return every id that ends an answer: the generation config's, else the model config's."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
