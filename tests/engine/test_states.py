"""Layers with a recurrent state: whatever is drafted, kept or broken off, the states are those of the committed tokens."""

from __future__ import annotations

from functools import cache, partial

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from fakes_transfer import teacher_of
from families import generated, tiny, variants
from interrupts import Tracer
from tiny import tiny_tokenizer

from rasd_integrations import RASD
from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding import steps
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.decoding.scoring import scores
from rasd_integrations.decoding.steps import FixedSteps
from rasd_integrations.drafters.base import Needs
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.papers.early_exit import EarlyExitDrafter
from rasd_integrations.drafters.papers.sparse_kv import SparseKVDrafter
from rasd_integrations.engine.executors.eager import EagerExecutor
from rasd_integrations.engine.executors.factory import make_executor
from rasd_integrations.engine.kv import buffer, state
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.kv.state import MOST_KEPT
from rasd_integrations.engine.target import TargetModel, _forward
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import DraftContext

N = 40
GREEDY = SamplingParams(max_tokens=N, ignore_eos=True)
PIECE = 16
# State space beside attention, convolutions, and both kinds of memory in each layer.
HYBRIDS = {"granitemoehybrid": "default", "lfm2_moe": "default", "falcon_h1": "default"}
FAMILIES = sorted(HYBRIDS)


@cache
def model_of(family: str):
    return tiny(dict(variants(family))[HYBRIDS.get(family, "default")])


@cache
def target_of(family: str = "granitemoehybrid") -> TargetModel:
    target = TargetModel(model_of(family))
    if not target.layout.one_by_one:
        target._pieces = PIECE, PIECE
    return target


def text(n: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 60, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPT = text(40)


@cache
def truth(family: str = "granitemoehybrid") -> tuple[int, ...]:
    return tuple(generated(model_of(family), PROMPT, N))


def decode(target, drafter=None, params=GREEDY, n=None, ids=PROMPT, kept=None, **how):
    config = SpeculationConfig(num_draft_tokens=n, max_draft_tokens=64)
    decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=kept)
    return [t for block in decoder.generate(ids, params, **how) for t in block.token_ids]


def fresh(target: TargetModel, ids: list[int]) -> KVBuffer:
    buffer = KVBuffer(len(ids))
    for _ in target.prefill(ids, buffer):
        pass
    return buffer


def tensors(buffer: KVBuffer) -> list[torch.Tensor]:
    tables = [vars(layer).values() for layer in buffer.snapshots.at(buffer.length).values()]
    parts = [table.values() for values in tables for table in values if isinstance(table, dict)]
    return [part for values in parts for part in values if isinstance(part, torch.Tensor)]


def check(target: TargetModel, buffer: KVBuffer, ids: list[int]) -> None:
    """Assert that ``buffer`` continues ``ids`` as a fresh one does, from states that are those of its tokens."""
    wanted = fresh(target, ids[: buffer.length])
    assert len(tensors(buffer)) == len(tensors(wanted)) > 0
    for mine, other in zip(tensors(buffer), tensors(wanted), strict=True):
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-3)
    rest = ids[buffer.length :]
    torch.testing.assert_close(
        target.step(rest, buffer), target.step(rest, wanted), atol=5e-4, rtol=1e-3
    )


SCRIPTS = fakes.scripts(60)


@pytest.mark.parametrize("shape", ["chain", pytest.param("tree", marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", sorted(SCRIPTS))
@pytest.mark.parametrize(
    "n", [None, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 16))]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_ids_are_those_of_generate(family, n, script, shape):
    """The losslessness matrix; trees become chains."""
    propose = SCRIPTS[script](truth(family))
    if shape == "tree":
        propose = fakes.as_tree(propose, 60)
    assert decode(target_of(family), ScriptedDrafter(propose), n=n) == [*truth(family)]


@pytest.mark.parametrize("family", [*FAMILIES, "jamba", "nemotron_h"])
def test_prompts_shorter_than_a_convolution(family):
    """States begin with a step, too, and pieces may be of one token."""
    for length in (1, 2, 3, 17):
        ids = PROMPT[:length]
        said = generated(model_of(family), ids, 12)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        for n in (None, 3):
            drafter = ScriptedDrafter(fakes.partly_right(said, 60))
            assert decode(target_of(family), drafter, params, n=n, ids=ids) == said


@pytest.mark.parametrize("n", [None, 1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_true_after_every_block(family, n):
    """Whatever part of a draft was accepted."""
    target, kept = target_of(family), PrefixCache(1 << 24)
    drafter = ScriptedDrafter(fakes.partly_right(truth(family), 60))
    config = SpeculationConfig(num_draft_tokens=n)
    decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=kept)
    ids, behind = [*PROMPT], set()
    for block in decoder.generate(ids, GREEDY):
        if block.token_ids:
            ids += block.token_ids
            buffer = kept._entries[-1].buffer
            behind.add(len(ids) - 1 - buffer.length)
            check(target, buffer, ids)
    assert len(ids) == 40 + N
    assert 0 in behind
    assert n is None or max(behind) > 0


class Counting(EagerExecutor):
    """Notes the rows of each forward; fails at one of them, behind its layers."""

    def __init__(self, executor, fails_at: int | None = None):
        self.executor, self.rows, self.fails_at = executor, [], fails_at

    def step(self, ids, context, *, num_logits):
        self.rows.append(len(ids))
        out = self.executor.step(ids, context, num_logits=num_logits)
        if len(self.rows) == self.fails_at:
            msg = "in mid-step"
            raise ZeroDivisionError(msg)
        return out


def counted(monkeypatch, target, **how) -> Counting:
    counting = Counting(target._executor, **how)
    monkeypatch.setattr(target._turns, "_run", partial(_forward, counting))
    return counting


def test_only_what_a_draft_lost_runs_again(monkeypatch):
    """Accepted drafts cost nothing more; after others the accepted tokens do, and never more than a few."""
    target, said = target_of(), truth()
    counting = counted(monkeypatch, target)
    assert decode(target, ScriptedDrafter(fakes.oracle(said)), n=5, ids=PROMPT) == [*said]
    assert counting.rows == [16, 16, 7, *[6] * 6, 4]
    counting.rows.clear()
    assert decode(target, ScriptedDrafter(fakes.always_wrong(said, 60)), n=3) == [*said]
    # One more of the accepted tokens in each step; nine of them are read by themselves.
    assert counting.rows[3:14] == [4, 5, 6, 7, 8, 9, 10, 11, 12, 9, 4]
    counting.rows.clear()
    assert decode(target) == [*said]
    assert counting.rows == [16, 16, 8, *[1] * 39]


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_are_reused_up_to_the_end_of_a_piece(family):
    """Answers are the cold ones, and what is reused is what a snapshot was kept of."""
    target, kept = target_of(family), PrefixCache(1 << 24)
    # The third one's prompt ends where the fourth one's own text begins.
    for own, reused in ((8, 0), (9, 32), (0, 32), (20, 40), (-15, 16)):
        stats, ids = DecodingStats(), [*PROMPT[: 40 + min(own, 0)], *text(max(own, 0), seed=own)]
        answer = decode(target, ids=ids, kept=kept, stats=stats)
        assert answer == generated(model_of(family), ids, N)
        assert stats.cached_prompt_tokens == reused
    assert decode(target, ids=PROMPT, kept=kept, namespace="other") == [*truth(family)]
    again = DecodingStats()
    decode(target, ids=PROMPT, kept=kept, namespace="third", stats=again)
    assert again.cached_prompt_tokens == 0


def test_a_conversation_goes_on_from_its_last_step():
    """The end of an answer is a place to go on from, too."""
    target, kept, stats = target_of(), PrefixCache(1 << 24), DecodingStats()
    answer = decode(target, kept=kept)
    ids = [*PROMPT, *answer, *text(5, seed=7)]
    assert decode(target, ids=ids, kept=kept, stats=stats) == generated(target.model, ids, N)
    assert stats.cached_prompt_tokens == 40 + N - 1


def test_streams_share_a_prefix_while_one_is_running():
    """Snapshots are never changed, so a copy needs none of its own."""
    target, kept, stats = target_of(), PrefixCache(1 << 24), DecodingStats()
    config = SpeculationConfig(num_draft_tokens=3)
    drafter = ScriptedDrafter(fakes.partly_right(truth(), 60))
    decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=kept)
    first = decoder.generate(PROMPT, GREEDY)
    seen = [t for _ in range(6) for t in next(first).token_ids]
    second = decoder.generate(PROMPT, GREEDY, stats=stats)
    other = [t for _ in range(4) for t in next(second).token_ids]
    assert stats.cached_prompt_tokens == 39
    abandoned = decoder.generate(PROMPT, GREEDY)
    next(abandoned), next(abandoned)
    abandoned.close()
    assert [*seen, *(t for b in first for t in b.token_ids)] == [*truth()]
    assert [*other, *(t for b in second for t in b.token_ids)] == [*truth()]


def test_few_snapshots_are_kept_and_all_are_counted():
    """The last ones of a long text, and some of the older ones."""
    target = target_of()
    buffer = fresh(target, text(20 * PIECE))
    edges = [s.length // PIECE for s in buffer.snapshots._known]
    assert edges == [1, 9, 13, 15, 17, 18, 19, 20]
    assert len(edges) == MOST_KEPT
    one = target.layout.state_nbytes
    assert one == sum(t.nbytes for t in tensors(buffer)) > 0
    assert buffer.nbytes == 20 * PIECE * target.kv_bytes_per_token + MOST_KEPT * one
    decoder = SpeculativeDecoder(target)
    assert decoder.nbytes(100) == 100 * target.kv_bytes_per_token + (MOST_KEPT + 2) * one
    target.step([1, 2, 3], buffer)
    assert buffer.nbytes <= decoder.nbytes(20 * PIECE)
    buffer.truncate(10 * PIECE + 3)
    assert buffer.length == 9 * PIECE
    ids = [*text(9 * PIECE), *text(5 * PIECE, seed=1)]
    for _ in target.prefill(ids[buffer.length :], buffer):
        pass
    buffer.truncate(13 * PIECE)  # where there was a snapshot of the text before
    check(target, buffer, [*ids[: 13 * PIECE], 5])
    buffer.truncate(3)
    assert buffer.length == 0


def test_a_step_that_fails_or_is_left_changes_nothing(monkeypatch):
    """Neither the buffer nor the states; nor does an uncommitted draft."""
    target = target_of()
    buffer = fresh(target, PROMPT)
    before = [t.clone() for t in tensors(buffer)]
    wanted = target.step(PROMPT[:3], buffer).clone()
    counted(monkeypatch, target, fails_at=1)
    with pytest.raises(ZeroDivisionError):
        target.step(PROMPT[:3], buffer)
    target.step([5, 6, 7], buffer)
    buffer.commit(range(2))  # a part of it: its states are not known
    assert buffer.length == len(PROMPT)
    assert all(map(torch.equal, tensors(buffer), before))
    assert torch.equal(target.step(PROMPT[:3], buffer), wanted)
    buffer.commit(range(1))
    buffer.commit(range(2))  # one behind another
    check(target, buffer, [*PROMPT, *PROMPT[:3], 4])


@pytest.mark.parametrize("fails_at", [2, 5])
def test_an_answer_that_breaks_off_leaves_what_it_kept(monkeypatch, fails_at):
    """In the prefill or in a step: the next answer goes on from what is true."""
    target, kept = target_of(), PrefixCache(1 << 24)
    with monkeypatch.context() as patch:
        counted(patch, target, fails_at=fails_at)
        with pytest.raises(ZeroDivisionError):
            decode(target, ScriptedDrafter(fakes.partly_right(truth(), 60)), n=4, kept=kept)
    stats = DecodingStats()
    assert decode(target, kept=kept, stats=stats) == [*truth()]
    assert stats.cached_prompt_tokens == (16 if fails_at == 2 else 39)


@pytest.mark.slow
def test_ctrl_c_at_any_line_leaves_true_states():
    """Of what steps, commits and keeps: the next answer goes on from what is there."""
    target, said = target_of(), [*truth()[:10]]
    params = SamplingParams(max_tokens=10, ignore_eos=True)

    def answer(kept: PrefixCache) -> list[int]:
        drafter = ScriptedDrafter(fakes.partly_right(said, 60))
        return decode(target, drafter, params, n=3, kept=kept)

    whole = Tracer(state, steps, buffer)
    assert whole.run(partial(answer, PrefixCache(1 << 24))) == said
    lasts = {place[:3]: place for place in whole.reached}
    assert len(lasts) > 60
    for place in lasts.values():
        kept, tracer = PrefixCache(1 << 24), Tracer(state, steps, buffer)
        with pytest.raises(KeyboardInterrupt):
            tracer.run(partial(answer, kept), at=place)
        assert answer(kept) == said, place


@pytest.mark.parametrize("n", [0, 1, 4])
def test_drafts_change_no_sampled_id(n):
    """With a seed: the same draws from the same distributions."""
    target = target_of()
    params = SamplingParams(temperature=0.9, top_p=0.95, seed=11, max_tokens=30, ignore_eos=True)
    plain = decode(target, params=params)
    assert len(set(plain)) > 3
    assert decode(target, ScriptedDrafter(fakes.partly_right(plain, 60)), params, n=n) == plain


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hybrid_drafts_for_itself(family, monkeypatch):
    """A drafter model goes back to its last snapshot, not to its prompt."""
    target = target_of(family)
    counting = counted(monkeypatch, target)
    drafter = ModelDrafter(target, confidence=0.0)
    assert decode(target, drafter, n=3) == [*truth(family)]
    assert max(counting.rows[6:]) <= 4
    rejected = ModelDrafter(TargetModel(tiny(dict(variants(family))[HYBRIDS[family]], seed=1)))
    assert decode(target, rejected, n=3) == [*truth(family)]


def test_a_teacher_keeps_states_of_its_own():
    """Knowledge transfer: two texts of one model, each behind its own snapshots."""
    target, own = target_of(), PROMPT[20:]
    said: list[int] = []
    for _ in range(20):
        texts = (torch.tensor([[*head, *said]]) for head in (PROMPT, own))
        p, q = (target.model(input_ids=ids).logits[0, -1].softmax(-1) for ids in texts)
        said.append(int((p + q).argmax()))
    for n, script in ((0, fakes.empty()), (4, fakes.partly_right(said, 60))):
        config = SpeculationConfig(num_draft_tokens=n, knowledge_transfer="mixture")
        decoder = SpeculativeDecoder(
            target, ScriptedDrafter(script), config=config, teacher=teacher_of(target)
        )
        context = DraftContext(prompt_ids=tuple(PROMPT), drafter_prompt_ids=tuple(own))
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        blocks = decoder.generate(PROMPT, params, context=context)
        assert [t for block in blocks for t in block.token_ids] == said


@pytest.mark.parametrize("family", ["jamba", "nemotron_h"])
def test_where_only_single_tokens_go_on_from_a_state(family, monkeypatch):
    """Mamba 1 forgets its state over several tokens; Nemotron-H bounds its time steps there, and not over one."""
    target, kept, said = target_of(family), PrefixCache(1 << 24), [*truth(family)]
    assert target.layout.one_by_one
    for n, script in ((None, fakes.oracle(said)), (3, fakes.partly_right(said, 60))):
        stats = DecodingStats()
        assert decode(target, ScriptedDrafter(script), n=n, kept=kept, stats=stats) == said
        assert stats.cached_prompt_tokens == 0
    assert len(kept) == 0
    buffer = fresh(target, PROMPT)
    before = [t.clone() for t in tensors(buffer)]
    wanted = target.step([4, 5, 6], buffer)
    assert all(map(torch.equal, tensors(buffer), before))
    rows = []
    for token in (4, 5, 6):
        rows.append(target.step([token], buffer))
        buffer.commit(range(1))
    torch.testing.assert_close(torch.cat(rows), wanted)
    counting = counted(monkeypatch, target)
    assert decode(target) == said
    assert counting.rows == [40, *[1] * 39]
    with pytest.raises(ConfigurationError, match="Ask without warming"):
        next(iter(SpeculativeDecoder(target).prefill(PROMPT)))


def test_scores_are_those_of_each_answer_alone():
    """Answers are no branches of one tree here."""
    target = target_of()
    decoder = SpeculativeDecoder(target)
    answers = [text(4, seed=8), text(7, seed=9), []]
    got = scores(decoder, PROMPT, answers)
    for answer, score in zip(answers[:2], got, strict=False):
        out = target.model(input_ids=torch.tensor([[*PROMPT, *answer]])).logits[0].log_softmax(-1)
        rows = out[len(PROMPT) - 1 : -1]
        wanted = float(rows[torch.arange(len(answer)), torch.tensor(answer)].mean())
        assert score == pytest.approx(wanted, abs=1e-4)
    assert got[2] == float("-inf")


def test_what_needs_keys_and_values_of_all_layers_is_refused(tmp_path):
    """By name, when it is asked for."""
    target = target_of()
    with pytest.raises(ConfigurationError, match="chains, one text at a time"):
        target.step([1, 2, 3], fresh(target, PROMPT), [-1, -1])
    with pytest.raises(ConfigurationError, match=r"deterministic=True needs keys and values"):
        FixedSteps(target)
    hidden = ScriptedDrafter(fakes.empty())
    hidden.needs = Needs(hidden=True)
    with pytest.raises(ConfigurationError, match="drafter of hidden states"):
        SpeculativeDecoder(target, hidden)
    for name in ("openvino", "openvino-kv8"):
        with pytest.raises(ConfigurationError, match=f"executor '{name}' does not run"):
            make_executor(name, target.model)
    rasd = RASD.from_model(target.model, tiny_tokenizer(), cache_dir=tmp_path)
    with pytest.raises(ConfigurationError, match="cache_dir"):
        rasd.warm(["some words"])
    assert not list(tmp_path.rglob("*.rasd-prefix"))


@pytest.mark.parametrize(
    "drafter", [EarlyExitDrafter(1), SparseKVDrafter("window", max_rows=8, sink=2)]
)
def test_drafters_that_read_a_part_of_the_target_say_why_they_do_not(drafter):
    """The answer is whole."""
    stats = DecodingStats()
    assert decode(target_of(), drafter, n=3, stats=stats) == [*truth()]
    assert "keep a recurrent state" in stats.off_reason


def test_auto_runs_a_hybrid_eagerly_with_one_line(caplog):
    """A compiled step has no room for states."""
    model = model_of("granitemoehybrid")
    assert type(make_executor("auto", model, owned=False)) is EagerExecutor
    from rasd_integrations.engine.executors import factory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "has_openvino", lambda: True)
        patch.setattr(factory, "pack_linears", lambda _model: None)
        assert type(make_executor("auto", model, owned=True)) is EagerExecutor
    assert len(caplog.messages) == 1
    assert "keep a recurrent state" in caplog.text
