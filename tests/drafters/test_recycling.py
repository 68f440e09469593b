"""The logits tree: what it proposes is what the target thought after the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters import candidates
from rasd_integrations.drafters.candidates import Candidates, Shortlist, most_likely
from rasd_integrations.drafters.recycling import CandidateIndex, RecyclingDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.types import Draft, DraftContext, TokenBlock

PROMPT = [5, 6, 7, 8, 5, 6, 9, 1, 5, 6, 7, 2, 5, 6]


def row(*candidates: tuple[int, float]) -> Candidates:
    """Return one row of token and probability."""
    ids, probs = zip(*candidates, strict=True)
    return Candidates(np.asarray([ids], np.int32), np.asarray([probs], np.float32))


def attached(
    drafter: RecyclingDrafter, target: TargetModel, prompt: list[int], *, hidden: bool = True
):
    """Return a session on a prefilled prompt, and the buffer."""
    buffer = KVBuffer(len(prompt) + 64, keeps_hidden=hidden)
    for _ in target.prefill(prompt[:-1], buffer):
        pass
    session = drafter.start(DraftContext(prompt_ids=tuple(prompt)))
    session.attach(target, buffer)
    return session, buffer


def test_shortlist_ranks_as_the_whole_output_layer_does():
    """Among all tokens the shortlist finds the same candidates, best first."""
    model = tiny_llama()
    hidden = torch.randn(11, model.config.hidden_size)
    whole = most_likely(model.get_output_embeddings()(hidden), 4)
    shortlist = Shortlist(model, range(model.config.vocab_size), 4)
    for short in (
        shortlist.of_hidden(hidden),
        shortlist.of_logits(model.get_output_embeddings()(hidden)),
    ):
        assert short.token_ids.tolist() == whole.token_ids.tolist()
        np.testing.assert_allclose(short.probs, whole.probs, rtol=1e-5)


def test_shortlist_knows_only_its_tokens(monkeypatch):
    """No other token is foretold, and where there are too few the rest says so."""
    monkeypatch.setattr(candidates, "_COMMON", 0)
    model = tiny_llama()
    found = Shortlist(model, [7, 3, 7], 4).of_hidden(torch.randn(5, model.config.hidden_size))
    assert {*found.token_ids.flatten().tolist()} == {3, 7, -1}
    assert (found.token_ids[:, 2:] == -1).all()


@pytest.mark.filterwarnings("error")
def test_impossible_tokens_are_no_candidates():
    """Fault 14: behind a grammar's end a row is all -inf; nothing is known of it, and nothing warned of."""
    inf = float("inf")
    logits = torch.tensor([[-inf] * 4, [2.0, -inf, 1.0, -inf], [float("nan"), 1.0, 2.0, 3.0]])
    found = most_likely(logits, 3)
    assert found.token_ids.tolist() == [[-1, -1, -1], [0, 2, -1], [-1, -1, -1]]
    assert found.probs[0].tolist() == found.probs[2].tolist() == [0, 0, 0]
    np.testing.assert_allclose(found.probs[1], [0.7311, 0.2689, 0], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_first_draft_begins_with_what_the_prompt_predicts(family):
    """After tokens that stood in the prompt, the root's children are the target's candidates there."""
    target = TargetModel(FAMILIES[family]())
    session, buffer = attached(RecyclingDrafter(num_candidates=3), target, PROMPT)
    draft = session.propose(64)
    roots = {t for t, p in zip(draft.token_ids, draft.parents, strict=True) if p == -1}
    # [5, 6] ended last at place 9; its row predicts, and 7 followed.
    hidden = buffer.hidden()[1][9:10]
    best = Shortlist(target.model, PROMPT, 3).of_hidden(hidden).token_ids[0].tolist()
    assert {best[0], best[1], 7} <= roots


def test_rows_of_a_reused_prefix_that_nobody_kept_are_only_copied_from():
    """Without hidden states a row still knows the token that followed in the prompt."""
    session, _ = attached(RecyclingDrafter(), TargetModel(tiny_llama()), PROMPT, hidden=False)
    draft = session.propose(8)
    assert 7 in draft.token_ids
    assert set(draft.token_ids) <= set(PROMPT)


def test_refused_nodes_teach():
    """What the target thought behind a refused node is drafted when its tokens come again."""
    session, _ = attached(RecyclingDrafter(num_candidates=2), TargetModel(tiny_llama()), PROMPT)
    logits = torch.full((3, 259), -20.0)
    logits[0, 40] = logits[1, 41] = logits[2, 77] = 20.0  # after 6; after 6 40; after 6 40 90
    session.learn(Draft((40, 90), source="s"), logits)
    session.observe(TokenBlock((40, 41)))
    session.observe(TokenBlock((6, 40, 90)))
    assert session.propose(1).token_ids == (77,)


def test_a_tree_teaches_what_its_paths_do():
    """A node's candidates are filed under the tokens of its own path, not of a branch beside it."""
    drafter, target = RecyclingDrafter(prompt=False, num_candidates=2), TargetModel(tiny_llama())
    logits = torch.randn(4, 259, generator=torch.Generator().manual_seed(2))
    learned = []
    for draft, rows in (
        (Draft((40, 90, 91), (-1, 0, 0)), [0, 1, 2, 3]),
        (Draft((40, 91)), [0, 1, 3]),
    ):
        session, _ = attached(drafter, target, PROMPT, hidden=False)
        session.learn(draft, logits[rows])
        learned.append(session._index.distribution((5, 6, 40, 91)))
    assert learned[0] == learned[1] != {}


def test_the_latest_rows_of_a_long_prompt_are_kept():
    """A prompt longer than the index fills it with its last positions."""
    session, _ = attached(RecyclingDrafter(max_rows=4), TargetModel(tiny_llama()), PROMPT)
    found = {token: bool(session._index.distribution((token,))) for token in PROMPT}
    assert found == {5: True, 6: True, 7: True, 8: False, 9: False, 1: False, 2: True}


def test_without_the_prompt_only_steps_teach():
    """Nothing is drafted before a step was taken, no hidden state is kept, and what steps say is learned as ever."""
    drafter = RecyclingDrafter(prompt=False, num_candidates=2)
    assert not drafter.needs.hidden
    session, _ = attached(drafter, TargetModel(tiny_llama()), PROMPT, hidden=False)
    assert not session.propose(8).token_ids
    logits = torch.full((1, 259), -20.0)
    logits[0, 40] = 20.0  # after 6
    session.learn(Draft(), logits)
    session.observe(TokenBlock((41,)))
    session.observe(TokenBlock((6,)))
    assert session.propose(1).token_ids == (40,)


def test_heads_of_a_tree_are_the_smaller_trees():
    """Nodes come best first: a smaller budget gives the head of a larger one's draft."""
    session, _ = attached(RecyclingDrafter(), TargetModel(tiny_llama()), PROMPT)
    whole = session.propose(32)
    assert 16 < len(whole) <= 32
    assert list(whole.node_probs) == sorted(whole.node_probs, reverse=True)
    small = session.propose(7)
    assert (small.token_ids, small.parents) == (whole.token_ids[:7], whole.parents[:7])


def test_longer_keys_count_for_more():
    """Where the last token says one thing and the last two another, the two are believed."""
    index = CandidateIndex(16, 2)
    index.add([(1, 2)], row((10, 1.0), (11, 0.0)))
    index.add([(2,)], row((20, 1.0), (21, 0.0)))
    distribution = index.distribution((1, 2))
    assert distribution[10] > distribution[20] > 0


@pytest.mark.parametrize("size", [4, 16])
def test_the_oldest_rows_go(size):
    """No more rows are kept than asked for, and keys of lost rows find nothing."""
    index = CandidateIndex(size, 1)
    for token in range(size + 6):
        index.add([(token,)], row((100 + token, 1.0)))
    found = [bool(index.distribution((token,))) for token in range(size + 6)]
    assert found == [False] * 6 + [True] * size


@pytest.mark.parametrize("between", [RecyclingDrafter, SuffixDrafter])
def test_hidden_rows_are_those_of_a_fresh_forward(between):
    """After tree commits, reuse, truncation and a drafter that reads none, kept hidden states are the model's own."""
    target = TargetModel(FAMILIES["gemma3"]())
    cache = PrefixCache(1 << 30)
    prompt = list(range(30, 60))
    forks = (prompt, [*prompt[:20], 7, 8, 9], [*prompt[:22], 4], prompt)
    for ids, made in zip(
        forks, (RecyclingDrafter, between, RecyclingDrafter, RecyclingDrafter), strict=True
    ):
        config = SpeculationConfig(num_draft_tokens=8)
        decoder = SpeculativeDecoder(target, made(), config=config, prefix_cache=cache)
        blocks = decoder.generate(ids, SamplingParams(max_tokens=12, ignore_eos=True))
        ids = [*ids, *(t for b in blocks for t in b.token_ids)]
    lease = decoder.lease([*ids, 1], 100, "")
    first, hidden = lease.buffer.hidden()
    assert first + len(hidden) == lease.reused
    assert first == 0 or between is SuffixDrafter
    with torch.inference_mode():
        fresh = target.model.base_model(torch.tensor([ids[: lease.reused]])).last_hidden_state[0]
    torch.testing.assert_close(hidden, fresh[first:], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("option", ["num_candidates", "max_draft", "max_rows"])
def test_options_out_of_range_are_refused(option):
    """The error names the option."""
    with pytest.raises(ConfigurationError, match=option):
        RecyclingDrafter(**{option: 0})


def test_hidden_states_are_known_from_the_first_that_was_kept():
    """Rows that were run before anyone asked for hidden states have none."""
    buffer = KVBuffer(16, keeps_hidden=True)
    buffer.length = 5
    buffer.write_hidden(torch.ones(2, 4))
    buffer.length = 7
    first, hidden = buffer.hidden()
    assert (first, hidden.tolist()) == (5, torch.ones(2, 4).tolist())
