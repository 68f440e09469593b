"""Targets, tokens and buffers that tests of steps share. A target of a family and executor is made once a session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from tiny import FAMILIES, VOCAB

from rasd_integrations.config import ExecutorName, SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.engine.executors.factory import make_executor
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel, _forward
from rasd_integrations.stats import DecodingStats

TREE = [-1, 0, 0, 2, 1, -1, 5]
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)


@cache
def shared_target(
    family: str = "llama", executor: ExecutorName = "eager", attention: str = "", head_dim: int = 8
) -> TargetModel:
    """Return the target that tests share, with one of :data:`ATTENTIONS`; who changes it makes one of his own."""
    model = FAMILIES[family](head_dim=head_dim)
    with ATTENTIONS[attention]():
        return TargetModel(model, executor=make_executor(executor, model))


@contextmanager
def _own_attention() -> Iterator[None]:
    """Have compiled executors run the package's attention, whatever is quicker here."""
    from rasd_integrations.engine.executors.openvino import choosing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "_CLEARLY", 0.0)
        yield


@contextmanager
def _paged_attention() -> Iterator[None]:
    """Have compiled executors run OpenVINO's attention, as without a compiler."""
    from rasd_integrations.engine.executors.openvino import choosing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "library", lambda *_: None)
        yield


ATTENTIONS = {"": nullcontext, "own": _own_attention, "paged": _paged_attention}


def random_ids(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (n,), generator=generator).tolist()


def prefilled(
    target: TargetModel, ids: Sequence[int], capacity: int = 0, *, keeps_hidden: bool = False
) -> KVBuffer:
    buffer = KVBuffer(capacity or len(ids), keeps_hidden=keeps_hidden)
    for _ in target.prefill(ids, buffer):
        pass
    return buffer


def close(got: torch.Tensor, wanted: torch.Tensor, off: float = 1e-5) -> None:
    """Assert equality within ``off`` of the spread, which is about 5 for logits."""
    torch.testing.assert_close(got, wanted, atol=off * max(1.0, float(wanted.std())), rtol=off)


def close_rows(got: KVBuffer, wanted: KVBuffer, length: int, off: float = 1e-4) -> None:
    """Assert that the first rows of all layers are equal within ``off``."""
    for layer in range(wanted.num_layers):
        pairs = zip(got.rows(layer, 0, length), wanted.rows(layer, 0, length), strict=True)
        for ours, theirs in pairs:
            close(ours, theirs, off)


def decoded(
    target: TargetModel,
    drafter: Any = None,
    params: SamplingParams = GREEDY,
    n: int | None = 5,
    ids: Sequence[int] = (),
    stats: DecodingStats | None = None,
) -> list[int]:
    config = SpeculationConfig(num_draft_tokens=n, max_draft_tokens=64)
    decoder = SpeculativeDecoder(target, drafter, config=config)
    blocks = decoder.generate(ids or random_ids(24, 3), params, stats=stats)
    return [token for block in blocks for token in block.token_ids]


def joint(
    target: TargetModel, drafts: Sequence[tuple[list[int], Any]], buffers: Sequence[KVBuffer]
) -> Sequence[torch.Tensor]:
    """Return the logits of one forward for ``(ids, parents)`` behind each buffer."""
    works = [
        target._prepared(ids, parents, buffer, len(ids))
        for (ids, parents), buffer in zip(drafts, buffers, strict=True)
    ]
    return [logits for (logits,) in _forward(target._executor, [(work,) for work in works])]
