"""A grammar over speculative decoding: the ids are those of the masked target, whatever is drafted."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache

import fakes
import numpy as np
import pytest
import torch
from fakes import ScriptedDrafter
from fakes_grammar import TableGrammar, banded
from steps import shared_target
from tiny import EOS, FAMILIES, VOCAB, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.constraints import chain_masks, guide, mask_rows
from rasd_integrations.engine.verification.sampling import process_logits
from rasd_integrations.errors import DecodingError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft, DraftContext

NUM_TOKENS = 32
PROMPT = [40, 41, 42, 43, 40, 41, 42, 99, 17, 40]
GREEDY = SamplingParams(max_tokens=NUM_TOKENS)
SAMPLED = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.9, top_p=0.95, seed=5)
PARAMS = {"greedy": GREEDY, "sampled": SAMPLED}


def grammar(follows=banded):
    return TableGrammar(follows, VOCAB)


def decode(target, drafter=None, params=GREEDY, n=None, stats=None, follows=banded, config=None):
    config = config or SpeculationConfig(num_draft_tokens=n, max_draft_tokens=64)
    decoder = SpeculativeDecoder(target, drafter, config=config)
    context = DraftContext(prompt_ids=(), drafter_prompt_ids=PROMPT[4:])
    blocks = decoder.generate(
        PROMPT, params, context=context, grammar=grammar(follows), stats=stats
    )
    return [t for block in blocks for t in block.token_ids]


def masked_greedy(model, follows=banded):
    """Return what a loop of fresh forwards over masked logits says."""
    ids, state = list(PROMPT), grammar(follows)
    while len(ids) < len(PROMPT) + NUM_TOKENS and not state.finished:
        logits = model(torch.tensor([ids])).logits[0, -1]
        allowed = follows(tuple(state.path))
        ids.append(max(allowed, key=lambda t: float(logits[t])))
        state.push(ids[-1])
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_plain_decoding_follows_the_masked_logits(family):
    """Without a drafter the ids are those of fresh forwards with forbidden tokens left out."""
    model = FAMILIES[family]()
    expected = masked_greedy(model)
    assert decode(TargetModel(model)) == expected
    assert expected != decode(TargetModel(model), follows=lambda path: range(256))


SCRIPTS = fakes.scripts(VOCAB)


@pytest.mark.parametrize("shape", ["chain", "tree"])
@pytest.mark.parametrize("script", sorted(SCRIPTS))
@pytest.mark.parametrize("n", [1, 5, 16])
@pytest.mark.parametrize("params", sorted(PARAMS))
def test_no_draft_changes_a_constrained_answer(params, n, script, shape):
    """The losslessness matrix under a grammar; with one seed a sampled answer is the same too."""
    truth = plain(params)
    propose = SCRIPTS[script](truth)
    if shape == "tree":
        propose = fakes.as_tree(propose, VOCAB)
    assert decode(shared_target(), ScriptedDrafter(propose), PARAMS[params], n=n) == truth


@cache
def plain(params):
    return decode(shared_target(), params=PARAMS[params])


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
@pytest.mark.parametrize("kind", ["suffix", "suffix-tree", "model", "cascade"])
def test_every_drafter_is_lossless_under_a_grammar(family, kind):
    """Real drafters, windows of attention included, greedy."""
    target = shared_target(family)
    model = ModelDrafter(target)
    drafter = {
        "suffix": SuffixDrafter(),
        "suffix-tree": SuffixDrafter(tree=True),
        "model": model,
        "cascade": CascadeDrafter(model, SuffixDrafter()),
    }[kind]
    assert decode(target, drafter, n=5) == decode(target)


@pytest.mark.parametrize("token", [0, 31, 32, 63, 64, 200])
def test_a_draft_keeps_the_tokens_that_a_mask_allows(token):
    """Whatever word of the mask they are in; the ones behind a forbidden one go."""
    state = grammar(lambda path: [8, 9] if path else [token, 7])
    draft, _ = guide(state, Draft((token, 8, 6, 9)), 8, ())
    assert draft.token_ids == (token, 8)


def test_a_model_drafter_drafts_inside_the_grammar():
    """On the target's own prompt a masked drafter is always right, so every draft stands whole."""
    target, stats = shared_target(), DecodingStats()
    decoder = SpeculativeDecoder(
        target, ModelDrafter(target, confidence=0.0), config=SpeculationConfig(num_draft_tokens=4)
    )
    list(decoder.generate(PROMPT, GREEDY, grammar=grammar(), stats=stats))
    assert stats.drafted > 20
    assert stats.acceptance_rate == 1.0


@pytest.mark.slow
def test_a_sampled_model_draft_keeps_the_masked_distribution():
    """Block verification of drafts from a masked q follows the masked p: first two tokens, by frequency."""

    def follows(path):
        return [] if len(path) == 2 else [10, 20, 30]

    model = tiny_llama()
    target = TargetModel(model)
    drafter = ModelDrafter(target, confidence=0.0)
    exact = {}
    for first in (10, 20, 30):
        p = distribution_of(model, PROMPT)
        q = distribution_of(model, [*PROMPT, first])
        exact |= {(first, t): p[first] * q[t] for t in (10, 20, 30)}
    runs = 600
    seen: Counter[tuple[int, ...]] = Counter()
    for seed in range(runs):
        params = SamplingParams(max_tokens=3, temperature=1.5, seed=seed)
        seen[tuple(decode(target, drafter, params, n=2, follows=follows))] += 1
    assert set(seen) <= set(exact)
    # Five standard deviations of each frequency: less than one false alarm in 100 000 runs of the test.
    for outcome, chance in exact.items():
        bound = 5 * math.sqrt(chance * (1 - chance) / runs) + 1e-3
        assert abs(seen[outcome] / runs - chance) < bound, outcome


def distribution_of(model, ids):
    logits = model(torch.tensor([ids])).logits[0, -1]
    masked = torch.full_like(logits, float("-inf"))
    masked[[10, 20, 30]] = logits[[10, 20, 30]]
    return process_logits(masked, 1.5, 1.0, 0).tolist()


def test_forced_tokens_are_drafted_for_free():
    """A grammar that leaves no choice is walked in a few wide steps, without any drafter."""
    text = list(range(50, 130))
    stats = DecodingStats()
    params = SamplingParams(max_tokens=100)
    got = decode(
        shared_target(), params=params, stats=stats,
        follows=lambda path: text[len(path) : len(path) + 1],
    )  # fmt: skip
    assert got == text
    assert stats.target_steps == 3  # the prompt's own token, 64 rows, the rest
    assert stats.as_dict()["drafters"]["grammar"] == {"drafted": 78, "accepted": 78}


def test_the_end_of_the_grammar_ends_the_answer():
    """Nothing may follow: the answer stops by itself, without an end token."""
    target = shared_target()
    decoder = SpeculativeDecoder(target)
    blocks = list(
        decoder.generate(
            PROMPT, GREEDY, grammar=grammar(lambda p: range(40, 80) if len(p) < 7 else [])
        )
    )
    assert sum(len(b.token_ids) for b in blocks) == 7
    assert blocks[-1].finish_reason == "stop"


def test_an_answer_cut_short_says_length():
    """The budget ends the answer inside the grammar."""
    decoder = SpeculativeDecoder(shared_target())
    blocks = list(decoder.generate(PROMPT, SamplingParams(max_tokens=3), grammar=grammar()))
    assert blocks[-1].finish_reason == "length"


def test_end_tokens_follow_only_where_the_grammar_allows_them():
    """An end token ends the answer where it is allowed, and cannot be drafted elsewhere."""

    def follows(path):
        return [60] if len(path) < 4 else [EOS]

    drafter = ScriptedDrafter(lambda answer, budget: Draft((EOS, EOS, EOS)[:budget], source="s"))
    decoder = SpeculativeDecoder(shared_target(), drafter)
    blocks = list(decoder.generate(PROMPT, GREEDY, grammar=grammar(follows)))
    assert [t for b in blocks for t in b.token_ids] == [60, 60, 60, 60, EOS]
    assert blocks[-1].finish_reason == "stop"


def test_a_failing_drafter_leaves_the_grammar_in_place():
    """A drafter that steps on in its grammar and raises harms nobody."""

    class Careless:
        name = "careless"

        def start(self, context):
            self.grammar = context.grammar
            return self

        def propose(self, budget):
            self.grammar.push(next(iter(banded(()))))
            msg = "gone"
            raise RuntimeError(msg)

        def observe(self, block): ...

        def close(self): ...

    target, stats = shared_target(), DecodingStats()
    assert decode(target, Careless(), stats=stats, n=3) == decode(target)
    assert "gone" in stats.faults[0]


def test_a_grammar_without_a_way_on_is_an_error():
    """No token at all may follow, and the grammar is not at its end: said, not hung."""

    class Stuck(TableGrammar):
        finished = False

    decoder = SpeculativeDecoder(shared_target())
    with pytest.raises(DecodingError, match="No token has a positive probability"):
        list(decoder.generate(PROMPT, GREEDY, grammar=Stuck(lambda path: [], VOCAB)))


# --- the pieces ---


def test_guide_cuts_a_tree_and_follows_its_first_path_with_forced_tokens():
    """Forbidden nodes go with their children; what is forced hangs on the first leaf."""
    table = {(): [1, 2], (1,): [3], (1, 3): [4], (1, 3, 4): [5], (2,): [6, 7], (2, 6): [9, 8]}
    state = TableGrammar(lambda path: table.get(path, []), 32)
    draft = Draft((9, 1, 2, 5, 3, 6), parents=(-1, -1, -1, 0, 1, 2), source="s")
    cut, bits = guide(state, draft, room=16, eos_ids=())
    assert cut.token_ids == (1, 2, 3, 6, 4, 5)
    assert cut.parents == (-1, -1, 0, 1, 2, 4)
    assert cut.sources == ("s", "s", "s", "s", "grammar", "grammar")
    allowed = [
        set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))) for row in bits
    ]
    assert allowed == [{1, 2}, {3}, {6, 7}, {4}, {8, 9}, {5}, set(range(32))]
    assert state.path == []


@pytest.mark.parametrize("parents", [None, (-1, 0, 1, 1), (-1, 0, 0, 2)])
def test_nothing_is_drafted_behind_the_end_of_a_grammar(parents):
    """There a mask allows everything, and no token may follow."""
    state = TableGrammar(lambda path: {(): [1, 2], (1,): [3]}.get(path, []), 32)
    cut, bits = guide(
        state, Draft((1, 3, 7, 8), parents=parents, source="s"), room=16, eos_ids=(9,)
    )
    assert cut.token_ids == (1, 3)
    assert cut.parents == (-1, 0)
    assert len(bits) == 3
    assert state.path == []


def test_guide_keeps_within_the_room():
    """Forced tokens fill the room and no more."""
    state = TableGrammar(lambda path: [len(path)], 64)
    cut, bits = guide(state, Draft(), room=3, eos_ids=())
    assert cut.token_ids == (0, 1, 2)
    assert len(bits) == 4


def test_a_sampled_draft_is_never_cut():
    """Its distribution is the one it was drawn from; behind a forbidden token the rows are left open."""
    state = TableGrammar(lambda path: [1], 32)
    draft = Draft((1, 2, 1), probs=torch.full((3, 32), 1 / 32), source="s")
    cut, bits = guide(state, draft, room=9, eos_ids=())
    assert cut is draft
    assert [int(row[0]) for row in bits] == [2, 2, -1, -1]
    assert state.path == []


def test_masks_reach_every_token_of_an_odd_vocabulary():
    """The last word of a mask is cut to the vocabulary; allowed logits keep their values."""
    state = TableGrammar(lambda path: [0, 31, 32, 258], VOCAB)
    logits = torch.arange(2 * VOCAB, dtype=torch.bfloat16).view(2, VOCAB)
    masked = mask_rows(logits.clone(), chain_masks(state, [31], ()))
    for row in (0, 1):
        kept = torch.isfinite(masked[row]).nonzero().flatten().tolist()
        assert kept == [0, 31, 32, 258]
        assert torch.equal(masked[row, kept], logits[row, kept])
