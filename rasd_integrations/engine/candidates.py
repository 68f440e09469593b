"""The target's likeliest next tokens at some places: what a logits tree is drafted from.

They steer drafts and never the output, so their probabilities may be rough: over the kept tokens only, and
before temperature and soft caps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Candidates:
    """The target's likeliest next tokens after each of some rows.

    Attributes:
        token_ids: ``[rows, k]`` int32, likeliest first; -1 fills rows of which less is known.
        probs: ``[rows, k]`` float32, their probabilities among one another; 0 where the id is -1.
    """

    token_ids: NDArray[np.int32]
    probs: NDArray[np.float32]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.token_ids)

    @staticmethod
    def unknown(rows: int, k: int) -> Candidates:
        """Return rows of which nothing is known."""
        return Candidates(np.full((rows, k), -1, np.int32), np.zeros((rows, k), np.float32))


def likeliest(logits: Tensor, k: int, token_ids: Tensor | None = None) -> Candidates:
    """Return the ``k`` likeliest tokens of each row.

    Args:
        logits: ``[rows, n]``, any float type.
        k: At least 1; where ``n`` is smaller the rest is -1.
        token_ids: ``[n]``, the tokens of the columns; ``None``: column ``i`` is token ``i``.
    """
    found = Candidates.unknown(logits.shape[0], k)
    best = logits.topk(min(k, logits.shape[1]))
    columns = best.indices if token_ids is None else token_ids[best.indices]
    n = columns.shape[1]
    found.token_ids[:, :n] = columns.cpu().numpy()
    found.probs[:, :n] = best.values.float().softmax(-1).cpu().numpy()
    return found


Ranking = Callable[[Tensor], Candidates]
"""Finds the candidates of final hidden states ``[rows, hidden]``."""


def shortlist(model: PreTrainedModel, token_ids: Sequence[int], k: int) -> Ranking:
    """Return what finds the candidates of a prompt's rows among the prompt's own tokens.

    Answers over documents are written in the documents' words, and an output layer of some thousand tokens
    costs a thirtieth of the whole one. Where the layer's weight cannot be read, all of it is run.

    Args:
        model: The target.
        token_ids: The prompt, or any tokens that are worth foretelling.
        k: Candidates a row.
    """
    head = model.get_output_embeddings()
    weight = _weight(model, head)
    if weight is None:
        return lambda hidden: likeliest(head(hidden), k)
    wanted = torch.tensor(sorted(set(token_ids)), dtype=torch.long, device=weight.device)
    some = weight.detach()[wanted]
    bias = getattr(head, "bias", None)
    offset = None if bias is None else bias.detach()[wanted]
    return lambda hidden: likeliest(nn.functional.linear(hidden, some, offset), k, wanted)


def _weight(model: PreTrainedModel, head: nn.Module) -> Tensor | None:
    """Return the output layer's ``[vocab, hidden]``; of a packed layer the tied embedding's."""
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    for layer in (head, model.get_input_embeddings() if tied else None):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point():
            return weight
    return None
