"""Inputs of compiled steps that stay where they are: each step reads its own numbers, whatever came before."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from steps import shared_target
from tiny import FAMILIES

pytest.importorskip("openvino")

import openvino

from rasd_integrations.engine.executors.openvino.attention import Span
from rasd_integrations.engine.executors.openvino.executor import CompiledExecutor
from rasd_integrations.engine.executors.openvino.inputs import Frame
from rasd_integrations.engine.executors.openvino.own import OwnAttention
from rasd_integrations.engine.executors.openvino.paged import PagedAttention
from rasd_integrations.engine.executors.openvino.tracing import Angles
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel


@pytest.mark.slow
def test_steps_of_ever_other_shapes_equal_eager():
    """Rows, trees and answers change at random, more of them than frames are kept."""
    model = FAMILIES["gemma3"]()
    executor = CompiledExecutor(model)
    ours, eager = TargetModel(model, executor=executor), shared_target("gemma3")
    chance = random.Random(0)
    answers = []
    for _ in range(2):
        ids = [chance.randrange(200) for _ in range(20)]
        mine, theirs = KVBuffer(200), KVBuffer(200)
        for target, buffer in ((ours, mine), (eager, theirs)):
            for _ in target.prefill(ids, buffer):
                pass
        answers.append((mine, theirs))
    widths = set()
    for _ in range(40):
        mine, theirs = chance.choice(answers)
        n = chance.choice((1, 2, 6, 9, 13, 17, 21))
        draft = [chance.randrange(200) for _ in range(n)]
        tree = chance.random() < 0.5
        parents = [chance.randrange(-1, i) for i in range(n - 1)] if tree else None
        widths.add((n, tree))
        got, wanted = ours.step(draft, mine, parents), eager.step(draft, theirs, parents)
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)
        for buffer in (mine, theirs):
            buffer.commit([0])
        assert executor._frame_of.cache_info().currsize <= 8
    assert len(widths) > 8


@pytest.mark.parametrize(
    "attention", [PagedAttention, partial(OwnAttention, library=Path(), variant="base")]
)
def test_a_refilled_frame_is_as_a_new_one(attention):
    """Ids, positions, angles, ends, prefixes and masks are those of the step, in rows without gaps."""

    class Rotary(torch.nn.Module):
        """Angles whose memory lies the other way round, as some architectures make them."""

        def forward(self, positions):
            table = torch.stack([positions[0] / 3.0, positions[0] * 7.0])  # [2, n]
            return table.T[None], (-table).T[None]

    trace = SimpleNamespace(
        angles=(Angles(Rotary(), (torch.zeros(1, 1, dtype=torch.long),), {}),),
        head_counts=(1, 3),
        layers=(),
    )
    operation = attention(trace, openvino.Type.f32, in_8_bits=False)
    mask = np.tril(np.ones((4, 4), np.bool_))
    other = mask.copy()
    depths = np.array([0, 1, 2, 1], np.int32)
    other[3, 1] = False

    def frame(prefix: int, sees: np.ndarray, start: int) -> Frame:
        spans = [Span(prefix, 4, 64, 160, depths, sees)]
        made = Frame(operation, [span.place for span in spans], 288, first_row=0)
        fill(made, spans, start)
        return made

    def fill(made: Frame, spans: list[Span], start: int) -> None:
        ids, positions = torch.arange(start, start + 3), torch.arange(50, 53) + start
        made.fill(ids, positions, spans)

    used = frame(64, mask, 5)
    fill(used, [Span(70, 4, 64, 160, depths, other)], 11)
    for got, wanted in zip(used.tensors, frame(70, other, 11).tensors, strict=True):
        np.testing.assert_array_equal(got.data, wanted.data)
    ids, positions, rows, cosines, *_ = (tensor.data for tensor in used.tensors)
    assert ids.tolist() == [[11, 12, 13, 13]]
    assert positions.tolist() == [[61, 62, 63, 63]]
    assert rows.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(cosines[0, :, 1], 7.0 * positions[0])
