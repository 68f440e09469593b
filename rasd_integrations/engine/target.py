"""The model that decides: owns the weights and hides how a step runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rasd_integrations.engine.attention import StepContext
from rasd_integrations.engine.executor import EagerExecutor, Executor, check_attention
from rasd_integrations.engine.kv import KVBuffer
from rasd_integrations.errors import DeviceMemoryError

PREFILL_PIECE = 512  # tokens; on a GPU four times as many keep it busy


class TargetModel:
    """A causal language model as the engine sees it: token ids in, logits out, keys and values kept.

    Used for the target and, with its own buffers, for a model drafter.

    Attributes:
        lock: Held for one step, never for a stream, so that streams interleave.
        window: Longest sequence, in tokens.
        vocab_size: Rows of the logits.
        eos_ids: Ids that end an answer.
    """

    def __init__(self, model: PreTrainedModel, *, executor: Executor | None = None) -> None:
        """Wrap ``model``; its attention is routed through ours, its weights are not touched.

        Raises:
            ConfigurationError: The architecture cannot run speculative steps.
        """
        config = model.config.get_text_config()
        self.model = model
        self.device = model.device
        self.lock = threading.Lock()
        self.window = int(config.max_position_embeddings)
        self.vocab_size = int(config.vocab_size)
        self.eos_ids = _eos_ids(model)
        self._piece = PREFILL_PIECE if self.device.type == "cpu" else 4 * PREFILL_PIECE
        self._executor = executor or EagerExecutor(model)
        with torch.inference_mode():
            check_attention(self._executor, int(config.num_hidden_layers), self.device)

    def prefill(self, ids: Sequence[int], buffer: KVBuffer) -> Iterator[int]:
        """Append the keys and values of ``ids`` to ``buffer``, piece by piece.

        Yields:
            Tokens done after each piece; the lock is free in between.

        Raises:
            DeviceMemoryError: The device's memory is full; the buffer holds what was appended before.
        """
        for start in range(0, len(ids), self._piece):
            piece = ids[start : start + self._piece]
            with self.lock:
                self._run(piece, None, buffer, want_logits=False)
                buffer.commit(range(len(piece)))
            yield start + len(piece)

    def step(
        self, ids: Sequence[int], buffer: KVBuffer, parents: Sequence[int] | None = None
    ) -> Tensor:
        """Run ``ids`` behind the committed tokens; commit nothing.

        Args:
            ids: The last token, whose row is not in the buffer yet, and the draft behind it.
            buffer: The prefix; afterwards its spare room holds the rows for :meth:`KVBuffer.commit`.
            parents: Parent of each drafted token, -1 the last token; ``None`` is a chain.

        Returns:
            Logits ``[len(ids), vocab]``.

        Raises:
            DeviceMemoryError: The device's memory is full; the buffer is as it was.
        """
        with self.lock:
            return self._run(ids, parents, buffer, want_logits=True)

    @torch.inference_mode()
    def _run(
        self,
        ids: Sequence[int],
        parents: Sequence[int] | None,
        buffer: KVBuffer,
        *,
        want_logits: bool,
    ) -> Tensor:
        n = len(ids)
        try:
            buffer.reserve(n)
            positions, mask = self._layout(n, parents, buffer.length)
            tokens = torch.tensor(ids, dtype=torch.long, device=self.device)
            context = StepContext(buffer, positions, mask)
            return self._executor.step(tokens, context, want_logits=want_logits).logits
        except (torch.OutOfMemoryError, MemoryError) as err:
            raise self._out_of_memory(n, buffer) from err
        except RuntimeError as err:  # torch's CPU allocator has no type of its own
            if "can't allocate memory" not in str(err):
                raise
            raise self._out_of_memory(n, buffer) from err

    def _layout(
        self, n: int, parents: Sequence[int] | None, length: int
    ) -> tuple[Tensor, Tensor | None]:
        """Return positions ``[n]`` and the ancestor mask ``[n, n]`` (``None`` for a chain)."""
        if parents is None:
            return torch.arange(length, length + n, device=self.device), None
        depth, mask = [0], torch.eye(n, dtype=torch.bool)
        mask[:, 0] = True
        for node, parent in enumerate(parents, start=1):
            depth.append(depth[parent + 1] + 1)
            mask[node] |= mask[parent + 1]
        positions = torch.tensor(depth, device=self.device) + length
        return positions, mask.to(self.device)

    def _out_of_memory(self, n: int, buffer: KVBuffer) -> DeviceMemoryError:
        msg = (
            f"A step of {n} tokens over {buffer.length} cached ones does not fit in the memory of "
            f"{self.device} (keys and values: {buffer.nbytes / 2**20:.0f} MiB). Shorten the prompt, lower "
            f"prefix_cache_bytes, or load the model in a smaller dtype."
        )
        return DeviceMemoryError(msg)


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return every id that ends an answer: the generation config's, then the model config's."""
    for config in (getattr(model, "generation_config", None), model.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
