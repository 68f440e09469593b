"""What graphs are held to before the first answer, and what happens where they cannot be had."""

from __future__ import annotations

import logging
from functools import partial

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from fakes_graphs import OUR_FAMILIES, Counted, executor, graph_target, taped
from steps import TREE, close, decoded, prefilled, random_ids, shared_target
from tiny import FAMILIES, VOCAB, tiny_llama

from rasd_integrations.engine.executors.base import StepOutput
from rasd_integrations.engine.executors.cuda_graphs import executor as graphs
from rasd_integrations.engine.executors.cuda_graphs import fixed
from rasd_integrations.engine.executors.cuda_graphs.executor import GraphExecutor
from rasd_integrations.engine.verification.exact import argmax_rows


def unable(run: graphs.Run) -> graphs.Run:
    """Refuse, as CUDA does where a step asks the device for a number."""
    msg = "operation not permitted when stream is capturing"
    raise RuntimeError(msg)


def wrong(run: graphs.Run) -> graphs.Run:
    """Record something else."""

    def replay() -> StepOutput:
        out = run()
        return StepOutput(out.logits.flip(-1), out.hidden)

    return replay


def broken(run: graphs.Run) -> graphs.Run:
    """Give no numbers."""

    def replay() -> StepOutput:
        out = run()
        return StepOutput(out.logits * float("nan"), out.hidden)

    return replay


@pytest.mark.parametrize(
    ("recorder", "message"),
    [(unable, "cannot be recorded"), (wrong, "is off by"), (broken, "is off by nan")],
)
def test_a_wrong_or_impossible_graph_changes_no_answer(recorder, message, caplog):
    """The check at construction finds it: one warning, and steps run eagerly."""
    with caplog.at_level(logging.WARNING):
        ours = graph_target(tiny_llama, recorder)
    assert [message in record.message for record in caplog.records] == [True]
    assert executor(ours).is_off
    assert decoded(ours) == decoded(shared_target())


def test_a_recording_that_fails_later_changes_no_answer(caplog):
    """Out of memory at the fourth recording, say: eager from there on, one warning."""
    counted = Counted()

    def failing(run: graphs.Run) -> graphs.Run:
        if counted.recordings >= 3:
            unable(run)
        return counted(run)

    truth = decoded(shared_target())
    ours = graph_target(tiny_llama, failing)
    drafter = ScriptedDrafter(fakes.partly_right(truth, VOCAB))
    with caplog.at_level(logging.WARNING):
        assert decoded(ours, drafter, n=5) == truth
        assert decoded(ours, n=None) == truth
    assert ["cannot be recorded" in record.message for record in caplog.records] == [True]
    assert executor(ours).is_off


@pytest.mark.parametrize("part", ["tail", "short", "long"])
def test_the_check_notices_a_wrong_mask(part, monkeypatch):
    """A tree whose siblings see each other, or a prefix cut short, is found before the first answer."""
    stock = fixed.FixedInputs.fill

    def fill(self, ids, segment):
        stock(self, ids, segment)
        if part == "tail":
            self.tail.zero_()
        elif part == "short":
            self.length.sub_(4)
        else:
            self.length.add_(20)

    monkeypatch.setattr(fixed.FixedInputs, "fill", fill)
    assert executor(graph_target(tiny_llama)).is_off


def test_half_precision_passes_the_check():
    """In bfloat16 graphs and eager differ by rounding, which the check allows for."""
    target = graph_target(lambda: tiny_llama().to(torch.bfloat16), taped)
    assert not executor(target).is_off


def test_a_model_over_several_devices_runs_eagerly(caplog):
    """A graph belongs to one device."""
    model = tiny_llama()
    elsewhere = torch.nn.Parameter(torch.empty(1, device="meta"), requires_grad=False)
    model.register_parameter("unused", elsewhere)
    with caplog.at_level(logging.WARNING):
        assert GraphExecutor(model).is_off
    assert "several devices" in caplog.text


def test_graphs_are_offered_for_cuda_alone():
    """On a CPU there is nothing to gain."""
    assert not graphs.is_available("cpu")
    assert graphs.is_available("cuda") == torch.cuda.is_available()


def flash(query, keys, values, ends_q, ends_k, max_q, max_k, *, return_aux, scale, seqused_k):
    """Do what torch's varlen_attn does for one sequence, as its documentation says: ``[T, H, D]`` in and out."""
    assert return_aux.lse
    assert (ends_q.tolist(), ends_k.tolist()) == ([0, len(query)], [0, len(keys)])
    assert (max_q, max_k) == (len(query), len(keys))
    assert {ends_q.dtype, ends_k.dtype, seqused_k.dtype} == {torch.int32}
    used = int(seqused_k)
    scores = torch.einsum("qhd,khd->hqk", query, keys[:used]) * scale
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[:used])
    return out, scores.logsumexp(-1)


@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_the_flash_form_of_the_prefix_equals_eager(family, monkeypatch):
    """With the kernel's contract in the kernel's place, split attention gives eager's logits."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", flash)
    monkeypatch.setattr(graphs, "_flash_prefix_for", lambda model: fixed.flash_prefix)
    make = FAMILIES[family]
    eager, ours = shared_target(family), graph_target(make)
    assert executor(ours)._prefix is fixed.flash_prefix
    ids = random_ids(40)
    expected, buffer = prefilled(eager, ids), prefilled(ours, ids)
    for seed in range(3):
        row = random_ids(6, seed)
        close(ours.step(row, buffer, TREE[:5]), eager.step(row, expected, TREE[:5]))
        buffer.commit([0, 1])
        expected.commit([0, 1])


def test_a_wrong_flash_kernel_gives_way_to_the_masked_form(monkeypatch, caplog):
    """The check tries the fast form first and takes the other where it errs; no warning is due."""

    def transposed(*args, **kwargs):
        out, lse = flash(*args, **kwargs)
        return out, lse - 3  # a log-sum-exp to another base, say

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", transposed)
    monkeypatch.setattr(graphs, "_flash_prefix_for", lambda model: fixed.flash_prefix)
    ours = graph_target(tiny_llama)
    assert executor(ours)._prefix is None
    assert not executor(ours).is_off
    assert not caplog.records


@pytest.mark.gpu
@pytest.mark.parametrize("family", OUR_FAMILIES)
def test_cuda_graphs_equal_eager(family):
    """The real thing, in float32 and bfloat16; never run so far."""
    for dtype in (torch.float32, torch.bfloat16):
        make = partial(lambda d: FAMILIES[family]().to("cuda", d), dtype)
        eager, ours = shared_target(family), graph_target(make, None)
        assert not executor(ours).is_off
        ids = random_ids(40)
        expected, buffer = prefilled(eager, ids), prefilled(ours, ids)
        tolerance = 1e-3 if dtype is torch.float32 else 0.1
        for seed in range(4):
            row = random_ids(6, seed)
            got, wanted = ours.step(row, buffer, TREE[:5]), eager.step(row, expected, TREE[:5])
            assert (got - wanted).float().std() < tolerance * wanted.float().std()


@pytest.mark.gpu
def test_a_greedy_step_waits_for_the_device_once():
    """The host reads the arg max of all rows, and nothing before; never run so far."""
    ours = graph_target(lambda: tiny_llama().to("cuda"), None)
    buffer = prefilled(ours, random_ids(40))
    for _ in range(3):
        argmax_rows(ours.step([1, 2, 3, 4], buffer, TREE[:3]))
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = ours.step([1, 2, 3, 4], buffer, TREE[:3])
        buffer.commit([0, 2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(argmax_rows(logits)) == 4
