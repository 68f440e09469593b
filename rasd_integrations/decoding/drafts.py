"""Checks what a drafter proposes: it may be the user's own code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from numbers import Real
from operator import index

from torch import Tensor

from rasd_integrations.errors import DecodingError
from rasd_integrations.types import Draft


def checked(draft: object, budget: int, vocab_size: int) -> Draft:
    """Return ``draft`` cut to ``budget`` tokens and before the first id outside the vocabulary.

    Args:
        draft: What a session proposed.
        budget: Longest draft; less than 1 is an empty one.
        vocab_size: Of the target, and so of ``probs`` and ``logits``.

    Raises:
        DecodingError: It is no draft, or its parts do not fit one another.
    """
    if not isinstance(draft, Draft):
        msg = f"propose() returned a {type(draft).__name__}, but must return a Draft."
        raise DecodingError(msg)
    n = len(draft)
    ids = _integers("token_ids", draft.token_ids)
    parents = None if draft.parents is None else _integers("parents", draft.parents)
    if parents is not None:
        _has_length("parents", parents, n)
        late = next((i for i, parent in enumerate(parents) if not -1 <= parent < i), None)
        if late is not None:
            msg = f"parents[{late}] is {parents[late]}, but must be -1 or the index of an earlier node."
            raise DecodingError(msg)
    draft = replace(draft, token_ids=ids, parents=parents)
    for name, tensor in (("probs", draft.probs), ("logits", draft.logits)):
        if tensor is not None:
            _check_rows(name, tensor, n, vocab_size, chain=draft.is_chain)
    _check_names(draft)
    if draft.node_probs is not None:
        _has_length("node_probs", draft.node_probs, n)
        node_probs: Sequence[object] = draft.node_probs
        odd = [x for x in node_probs if not isinstance(x, Real) or not isfinite(x)]
        if odd:
            msg = f"node_probs holds {odd[0]!r}, but must hold numbers."
            raise DecodingError(msg)
    most = min(n, max(budget, 0))
    return draft.head(next((i for i in range(most) if not 0 <= ids[i] < vocab_size), most))


def _integers(name: str, values: Sequence[object]) -> tuple[int, ...]:
    try:
        return tuple(map(index, values))  # type: ignore[arg-type]  # the error below names what is no integer
    except TypeError as err:
        msg = f"{name} is {values!r}, but must be a tuple of integers."
        raise DecodingError(msg) from err


def _has_length(name: str, values: Sequence[object], n: int) -> None:
    if len(values) != n:
        msg = f"{name} has {len(values)} entries for a draft of {n} tokens."
        raise DecodingError(msg)


def _check_rows(name: str, tensor: object, rows: int, vocab_size: int, *, chain: bool) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        msg = f"{name} is a {kind}, but must be a torch.Tensor of floats."
        raise DecodingError(msg)
    if tensor.shape != (rows, vocab_size):
        msg = f"{name} has shape {tuple(tensor.shape)}, but must have {(rows, vocab_size)}."
        raise DecodingError(msg)
    if not chain:
        msg = f"A draft with {name} must be a chain, but parents make a tree of it."
        raise DecodingError(msg)


def _check_names(draft: Draft) -> None:
    """Check that the statistics can count by ``source`` and ``sources``."""
    if draft.sources is not None:
        _has_length("sources", draft.sources, len(draft))
    names: Sequence[object] = (draft.source, *(draft.sources or ()))
    for source in names:
        if not isinstance(source, str):
            msg = f"source is {source!r}, but must be a text."
            raise DecodingError(msg)
