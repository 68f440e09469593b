"""Top-k next tokens of the target at given positions, for :class:`RecyclingDrafter`.

They choose drafts and never the output, so the probabilities may be rough: over the kept tokens only, and before
temperature and soft caps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from rasd_integrations.engine.executors.eager import input_device
from rasd_integrations.loading.quantised import QuantisedLinear

_COMMON = 2048
# torch shares larger operations among a CPU's threads, and waking those takes longer.
_SCORES = 32_768


@dataclass(frozen=True, slots=True)
class Candidates:
    """The target's top-k next tokens after each of some positions.

    Attributes:
        token_ids: ``[rows, k]`` int32, most likely first; padded with -1.
        probs: ``[rows, k]`` float32, probabilities among the kept tokens; 0 where the id is -1.
    """

    token_ids: NDArray[np.int32]
    probs: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.token_ids)

    @staticmethod
    def unknown(rows: int, k: int) -> Candidates:
        """Return rows of padding."""
        return Candidates(np.full((rows, k), -1, np.int32), np.zeros((rows, k), np.float32))


def most_likely(logits: Tensor, k: int, token_ids: NDArray[np.int32] | None = None) -> Candidates:
    """Return the ``k`` most likely tokens of each row.

    Args:
        logits: ``[rows, n]``, any float type.
        k: At least 1; padded if ``n`` is smaller or tokens are impossible (-inf).
        token_ids: ``[n]``, the tokens of the columns; ``None``: column ``i`` is token ``i``.
    """
    found = Candidates.unknown(logits.shape[0], k)
    best = logits.topk(min(k, logits.shape[1]))
    columns, scores = best.indices.cpu().numpy(), best.values.float().cpu().numpy()
    n = columns.shape[1]
    # A row behind the end of a grammar is all -inf.
    known = np.isfinite(scores) & np.isfinite(scores[:, :1])
    found.token_ids[:, :n] = np.where(
        known, columns if token_ids is None else token_ids[columns], -1
    )
    peak = np.where(known[:, :1], scores[:, :1], 0.0)
    weights = np.exp(np.where(known, scores - peak, -np.inf))
    total = weights.sum(axis=1, keepdims=True)  # at least 1 if anything is known
    found.probs[:, :n] = weights / np.maximum(total, 1.0)
    return found


class Shortlist:
    """Ranks a part of the vocabulary: the tokens of a prompt, and the 2048 most common.

    Answers over documents are written in the documents' words, and an output layer of some thousand tokens costs a
    tenth of the whole one. Byte-pair vocabularies are numbered by frequency. If the layer's weight cannot be read,
    the whole layer runs.
    """

    def __init__(self, model: PreTrainedModel, token_ids: Iterable[int], k: int) -> None:
        """Rank ``token_ids`` and the most common tokens, ``k`` of them for each row."""
        config = model.config.get_text_config()
        self._k = k
        self._head = model.get_output_embeddings()
        self._dtype = model.dtype
        self._weight = weight = _weight(model, self._head)
        device = input_device(model) if weight is None else weight.device
        wanted = np.zeros(int(config.vocab_size), np.bool_)
        wanted[:_COMMON] = True
        wanted[np.fromiter(token_ids, np.int64)] = True
        self._token_ids = np.flatnonzero(wanted).astype(np.int32)
        self._wanted = torch.from_numpy(self._token_ids).to(device)

    def of_hidden(self, hidden: Tensor) -> Candidates:
        """Return the candidates of final hidden states ``[rows, hidden]``."""
        if self._layer is None:
            return self.of_logits(self._head(hidden))
        weight, bias = self._layer
        logits = nn.functional.linear(hidden.to(weight.device), weight, bias)
        return most_likely(logits, self._k, self._token_ids)

    @cached_property
    def _layer(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of the output layer for these tokens; copied only if hidden states are ranked."""
        if isinstance(self._head, QuantisedLinear):
            rows = self._head.quantised.dense(self._wanted).to(self._dtype)
            return rows, None if self._head.bias is None else self._head.bias[self._wanted]
        if self._weight is None:
            return None
        bias = getattr(self._head, "bias", None)
        rows = self._weight.detach()[self._wanted]
        return rows, None if bias is None else bias.detach()[self._wanted]

    def of_logits(self, logits: Tensor) -> Candidates:
        """Return the candidates of logits ``[rows, vocab]``."""
        wanted = self._wanted.to(
            logits.device
        )  # a model over several devices has its logits elsewhere
        few = _SCORES // len(wanted) if logits.device.type == "cpu" else len(logits)
        parts = [
            most_likely(rows.index_select(1, wanted), self._k, self._token_ids)
            for rows in logits.split(max(few, 1))
        ]
        return Candidates(
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.probs for part in parts]),
        )


def _weight(model: PreTrainedModel, head: nn.Module) -> Tensor | None:
    """Return the output layer's ``[vocab, hidden]``; of a packed layer the tied embedding's."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    for layer in (head, model.get_input_embeddings() if tied else None):
        weight = getattr(layer, "weight", None)
        # Sharded and quantised weights have types of their own; an offloaded weight is on the meta device.
        if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
            continue
        if weight.ndim == 2 and weight.is_floating_point() and not weight.is_meta:
            return weight
    return None
