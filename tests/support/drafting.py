"""Decoding with a drafter, and filled buffers, for the tests of drafters."""

from __future__ import annotations

from collections.abc import Sequence

from fakes_datastore import random_ids

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel

__all__ = ["GREEDY", "decode", "filled", "random_ids"]

GREEDY = SamplingParams(max_tokens=32, ignore_eos=True)


def filled(target: TargetModel, ids: Sequence[int], **options: bool) -> KVBuffer:
    """Return a buffer that holds ``ids``."""
    buffer = KVBuffer(len(ids) + 64, **options)
    for _ in target.prefill(ids, buffer):
        pass
    return buffer


def decode(target, drafter=None, params=GREEDY, n=4, *, ids, cache=None, config=None, **how):
    """Return the ids of an answer to ``ids``, drafted ``n`` tokens at a time."""
    config = config or SpeculationConfig(num_draft_tokens=n, max_draft_tokens=64)
    decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=cache)
    return [token for block in decoder.generate(ids, params, **how) for token in block.token_ids]
