"""What every drafter promises: it changes the time of an answer, never its tokens, whatever happens to it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import fakes
import pytest
import torch
from drafting import GREEDY, filled
from drafting import decode as decoded
from fakes import ScriptedDrafter
from fakes_datastore import ids_store, random_ids
from fakes_distributions import distance, outcomes
from fakes_grammar import TableGrammar, banded
from fakes_memory import FromSource, answers_drafter
from fakes_vocabulary import translated_drafter
from tiny import FAMILIES, VOCAB, tiny_llama

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.drafters import (
    CascadeDrafter,
    DatastoreDrafter,
    DenseDrafter,
    Drafter,
    EarlyExitDrafter,
    FusedDrafter,
    ModelDrafter,
    RecyclingDrafter,
    SparseKVDrafter,
    SuffixDrafter,
)
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft, DraftContext, TokenBlock

NUM_TOKENS = 32
SAMPLED = replace(GREEDY, temperature=0.9, top_p=0.95, top_k=40, seed=11)
TEXT = random_ids(90, seed=39)  # every family has something to say to it
PROMPT = [*TEXT, *TEXT[20:60], *TEXT[10:40]]
CONTEXT = DraftContext(
    prompt_ids=(), chunk_ids=(PROMPT[30:50], PROMPT[60:72]), drafter_prompt_ids=PROMPT[-30:]
)
SMALL = {"max_rows": 48, "sink": 4, "window": 8, "confidence": 0.0}


@dataclass(frozen=True)
class Case:
    """A drafter under the contract.

    Attributes:
        make: Takes the target and its plain answer; builds the drafter.
        samples: Sampled answers are drafted by draws of its own, so one seed gives other tokens of the same
            distribution.
        bytes_only: It reads text, so it has no drafter for a vocabulary of two tokens.
        slow: Its tests are not part of the fast suite: drafters of papers, and variants of others.
    """

    make: Callable[[TargetModel, Sequence[int]], Drafter]
    samples: bool = False
    bytes_only: bool = False
    slow: bool = False


@cache
def other_model(vocab_size: int) -> TargetModel:
    return TargetModel(tiny_llama(7, vocab_size=vocab_size, eos_token_id=None))


def model_drafter(target: TargetModel) -> ModelDrafter:
    return ModelDrafter(other_model(target.vocab_size), confidence=0.0)


def store(truth: Sequence[int], vocab: int) -> TokenStore:
    """Return a store of texts that agree with the answer here and there, and of others."""
    spoiled = [(t + 1) % vocab if i % 7 == 5 else t for i, t in enumerate(truth)]
    forked = [(t + 3) % vocab if i % 5 == 4 else t for i, t in enumerate(truth)]
    return ids_store(spoiled, forked, random_ids(400, 8, vocab), list(truth[:17]))


def texts(truth: Sequence[int], vocab: int) -> Iterable[list[int]]:
    """Return the ids of :func:`store`'s texts."""
    return (ids.tolist() for _, ids in store(truth, vocab).rows())


def fused(target: TargetModel, truth: Sequence[int]) -> FusedDrafter:
    vocab = target.vocab_size
    scripts = (
        fakes.as_tree(fakes.partly_right(truth, vocab), vocab),
        fakes.always_wrong(truth, vocab),
        fakes.empty(),
        fakes.too_long(truth),
    )
    return FusedDrafter(
        [SuffixDrafter(tree=True), RecyclingDrafter(), *map(ScriptedDrafter, scripts)]
    )


def sparse(pattern: str) -> Case:
    return Case(lambda target, truth: SparseKVDrafter(pattern, **SMALL), samples=True, slow=True)


CASES = {
    "suffix": Case(lambda target, truth: SuffixDrafter()),
    "suffix tree": Case(lambda target, truth: SuffixDrafter(tree=True)),
    "recycling": Case(lambda target, truth: RecyclingDrafter()),
    "recycling, steps alone": Case(lambda target, truth: RecyclingDrafter(prompt=False)),
    "datastore": Case(lambda target, truth: DatastoreDrafter(store(truth, target.vocab_size))),
    "datastore chain": Case(
        lambda target, truth: DatastoreDrafter(store(truth, target.vocab_size), tree=False)
    ),
    "answers": Case(lambda target, truth: answers_drafter(*texts(truth, target.vocab_size))),
    "collection": Case(lambda target, truth: FromSource(*texts(truth, target.vocab_size))),
    "model": Case(lambda target, truth: model_drafter(target), samples=True),
    "self": Case(
        lambda target, truth: ModelDrafter(target, confidence=0.0), samples=True, slow=True
    ),
    "cascade": Case(
        lambda target, truth: CascadeDrafter(model_drafter(target), SuffixDrafter()), samples=True
    ),
    "cascade with a datastore": Case(
        lambda target, truth: CascadeDrafter(
            model_drafter(target), DatastoreDrafter(store(truth, target.vocab_size))
        ),
        samples=True,
        slow=True,
    ),
    "fused": Case(fused),
    "fused with a model": Case(
        lambda target, truth: FusedDrafter(
            [SuffixDrafter(), RecyclingDrafter()],
            CascadeDrafter(model_drafter(target), SuffixDrafter()),
            siblings=min(3, target.vocab_size - 1),
        )
    ),
    "dense": Case(lambda target, truth: DenseDrafter(), slow=True),
    "dense chain": Case(lambda target, truth: DenseDrafter(tree=False), slow=True),
    "sparse chunks": sparse("chunks"),
    "sparse window": sparse("window"),
    "sparse power": sparse("power"),
    "sparse cascade": Case(
        lambda target, truth: CascadeDrafter(SparseKVDrafter("window", **SMALL), SuffixDrafter()),
        samples=True,
        slow=True,
    ),
    "early exit": Case(
        lambda target, truth: EarlyExitDrafter(1, confidence=0.0), samples=True, slow=True
    ),
    "translated": Case(
        lambda target, truth: translated_drafter("merged"),
        samples=True,
        bytes_only=True,
        slow=True,
    ),
    "fused with a translated one": Case(
        lambda target, truth: FusedDrafter(
            [SuffixDrafter(tree=True)], translated_drafter("merged")
        ),
        bytes_only=True,
        slow=True,
    ),
}


def every(wanted: Callable[[Case], bool] = lambda case: True, *more: str) -> pytest.MarkDecorator:
    """Parametrise a test by the names of the wanted cases; some are slow."""
    chosen = [name for name, case in CASES.items() if wanted(case) or name in more]
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[slow] if CASES[n].slow else []) for n in chosen]
    )


def samples(case: Case) -> bool:
    return case.samples and not case.bytes_only


@cache
def target_of(family: str) -> TargetModel:
    return TargetModel(FAMILIES[family]())


@cache
def plain(family: str, *, sampled: bool = False) -> tuple[int, ...]:
    ids = decode(target_of(family), params=SAMPLED if sampled else GREEDY)
    assert len(set(ids)) > 3
    return tuple(ids)


def decode(target, drafter=None, params=GREEDY, n=5, *, ids=PROMPT, **how):
    return decoded(target, drafter, params, n, ids=ids, context=CONTEXT, **how)


def made(name: str, family: str = "llama", *, sampled: bool = False) -> Drafter:
    return CASES[name].make(target_of(family), plain(family, sampled=sampled))


def attached(drafter: Drafter, live: KVBuffer, **context: object):
    """Return a session of ``drafter`` over ``live``, for the prompt."""
    session = drafter.start(replace(CONTEXT, prompt_ids=PROMPT, **context))
    session.attach(target_of("llama"), live)
    return session


@every()
@pytest.mark.parametrize(
    ("family", "n"),
    [("llama", None), ("llama", 1), ("llama", 5), ("llama", 16), ("gemma3", 5), ("mistral", 2)],
)
def test_greedy_ids_equal_plain_decoding(name, family, n):
    """In float32, for every draft length and the schedule's own, with something drafted and no fault."""
    stats = DecodingStats()
    assert tuple(decode(target_of(family), made(name, family), n=n, stats=stats)) == plain(family)
    assert stats.faults == ()
    assert stats.drafted > 0 or n is None


@every(lambda case: not case.samples)
@pytest.mark.parametrize(("family", "n"), [("llama", 1), ("llama", 5), ("gemma3", 16)])
def test_a_seed_gives_the_plain_answer(name, family, n):
    """Deterministic drafts change no sampled token: one draw decides each node."""
    stats = DecodingStats()
    drafter = made(name, family, sampled=True)
    assert tuple(decode(target_of(family), drafter, SAMPLED, n, stats=stats)) == plain(
        family, sampled=True
    )
    assert (stats.faults, stats.drafted > 0) == ((), True)


SMALL_PROMPT = random_ids(160, seed=3, vocab=2)
TEMPERATURE = 2.0


@cache
def two_tokens() -> tuple[TargetModel, dict[tuple[int, ...], float]]:
    """Return a model with a vocabulary of two, and the distribution of its answers of three tokens."""
    model = tiny_llama(4, vocab_size=2, eos_token_id=None)
    expected: dict[tuple[int, ...], float] = {}
    for ids in itertools.product(range(2), repeat=3):
        rows = model(torch.tensor([[*SMALL_PROMPT, *ids]])).logits[0, -4:-1].double()
        probs = (rows / TEMPERATURE).softmax(-1)
        expected[ids] = float(probs[torch.arange(3), torch.tensor(ids)].prod())
    return TargetModel(model), expected


@pytest.mark.slow
@every(lambda case: not case.bytes_only)
def test_sampled_answers_follow_the_targets_distribution(name, oracle):
    """By enumeration of every draw, the drafter's own included: three tokens, exactly."""
    target, expected = two_tokens()
    params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=TEMPERATURE, seed=1)
    stats, cached = DecodingStats(), PrefixCache(1 << 24)
    truth = [*SMALL_PROMPT[-9:], 1, 0, 1]

    def answer():
        drafter = CASES[name].make(target, truth)
        config = SpeculationConfig(num_draft_tokens=2)
        decoder = SpeculativeDecoder(target, drafter, config=config, prefix_cache=cached)
        context = DraftContext(prompt_ids=(), chunk_ids=(SMALL_PROMPT[30:50],))
        blocks = decoder.generate(SMALL_PROMPT, params, context=context, stats=stats)
        return tuple(token for block in blocks for token in block.token_ids)

    found: dict[tuple[int, ...], float] = defaultdict(float, outcomes(oracle, answer))
    assert min(expected.values()) > 0.001
    assert distance(found, expected) < 1e-5
    assert (stats.faults, stats.drafted > 0) == ((), True)


@cache
def plain_under_a_grammar() -> tuple[int, ...]:
    return tuple(decode(target_of("llama"), grammar=TableGrammar(banded, VOCAB)))


@every()
def test_the_grammar_is_kept(name):
    """Under a grammar with forced tokens greedy answers are those of plain decoding under it."""
    target, stats = target_of("llama"), DecodingStats()
    expected = list(plain_under_a_grammar())
    drafter = CASES[name].make(target, expected)
    got = decode(target, drafter, stats=stats, grammar=TableGrammar(banded, VOCAB))
    assert (got, stats.faults) == (expected, ())
    assert all(token in banded(tuple(got[:i])) for i, token in enumerate(got))


@cache
def plain_to_another() -> tuple[list[int], tuple[int, ...]]:
    """Return another prompt and its plain answer."""
    ids = [*random_ids(25, seed=6), *PROMPT[30:]]
    return ids, tuple(decode(target_of("llama"), ids=ids))


@every()
def test_two_streams_take_turns(name):
    """Streams of one drafter share no state: each gives what it gives alone."""
    target = target_of("llama")
    other, answer = plain_to_another()
    prompts, alone = [PROMPT, other], [list(plain("llama")), list(answer)]
    config = SpeculationConfig(num_draft_tokens=4)
    cached = PrefixCache(1 << 22)
    decoder = SpeculativeDecoder(target, made(name), config=config, prefix_cache=cached)
    streams = [decoder.generate(ids, GREEDY, context=CONTEXT) for ids in prompts]
    seen: list[list[int]] = [[], []]
    for blocks in itertools.zip_longest(*streams):
        for block, out in zip(blocks, seen, strict=True):
            out += block.token_ids if block is not None else ()
    assert seen == alone


class Broken(Drafter):
    """A drafter one of whose methods raises after its work: at the second call, or at the only one."""

    def __init__(self, inner: Drafter, method: str) -> None:
        self.inner, self.method, self.name = inner, method, inner.name
        self.needs = inner.needs

    def start(self, context):
        if self.method == "start":
            self.fail()
        session = self.inner.start(context)
        own, calls = getattr(session, self.method), iter(range(1, 100))

        def broken(*args):
            done = own(*args)
            if next(calls) > 1 or self.method in ("attach", "close"):
                self.fail()
            return done

        setattr(session, self.method, broken)
        return session

    def fail(self):
        msg = "broken on purpose"
        raise RuntimeError(msg)


@every()
def test_a_drafter_that_breaks_in_a_draft_costs_speed_only(name):
    """The fault is reported, and answer, keys and values are those of plain decoding."""
    check_broken(name, "propose")


@pytest.mark.parametrize("name", ["suffix", "fused"])
@pytest.mark.parametrize("method", ["start", "attach", "learn", "observe", "close"])
def test_a_broken_drafter_costs_speed_only(name, method):
    """Whatever raises; an error on closing is only logged."""
    check_broken(name, method)


def check_broken(name: str, method: str) -> None:
    target, cached, stats = target_of("llama"), PrefixCache(1 << 22), DecodingStats()
    drafter = Broken(made(name), method)
    assert tuple(decode(target, drafter, stats=stats, cache=cached)) == plain("llama")
    told = f"drafter {drafter.name!r} failed: RuntimeError: broken on purpose"
    assert stats.faults == (() if method == "close" else (told,))
    check_cache(target, cached, [*PROMPT, *plain("llama")])


class Nameless(Drafter):
    """A drafter as short as one can be: neither it nor its drafts have a name."""

    def start(self, context):
        return ScriptedDrafter(lambda answer, budget: Draft((1, 2, 3)[:budget])).start(context)


def test_a_drafter_without_a_name_is_counted_by_its_class():
    """Drafts without a source are its own."""
    stats = DecodingStats()
    assert tuple(decode(target_of("llama"), Nameless(), stats=stats)) == plain("llama")
    assert (stats.faults, [*stats.drafters]) == ((), ["Nameless"])


def test_a_name_that_cannot_be_read_costs_speed_only():
    """Nothing of a drafter is read where its fault would end the answer."""

    class Anonymous(Nameless):
        @property
        def name(self):
            msg = "broken on purpose"
            raise RuntimeError(msg)

    stats = DecodingStats()
    assert tuple(decode(target_of("llama"), Anonymous(), stats=stats)) == plain("llama")
    assert stats.faults == ("drafter 'Anonymous' failed: RuntimeError: broken on purpose",)


@every()
def test_the_cache_equals_a_fresh_one(name):
    """In mid-answer and at its end, keys, values and hidden states are those of one forward."""
    target, cached = target_of("gemma3"), PrefixCache(1 << 22)
    config = SpeculationConfig(num_draft_tokens=5)
    decoder = SpeculativeDecoder(target, made(name, "gemma3"), config=config, prefix_cache=cached)
    ids = list(PROMPT)
    for number, block in enumerate(decoder.generate(PROMPT, GREEDY, context=CONTEXT)):
        ids += block.token_ids
        if number == 5:
            check_cache(target, cached, ids)
    check_cache(target, cached, ids)


def check_cache(target: TargetModel, cached: PrefixCache, ids: list[int]) -> None:
    """Assert that the cached buffer holds all of ``ids`` but the last as a fresh forward makes them."""
    buffer = cached._entries[-1].buffer
    assert buffer.length == len(ids) - 1
    fresh = filled(target, ids[:-1], keeps_hidden=True)
    pairs = [
        pair
        for layer in range(fresh.num_layers)
        for pair in zip(
            buffer.rows(layer, 0, buffer.length), fresh.rows(layer, 0, fresh.length), strict=True
        )
    ]
    if buffer.keeps_hidden:
        pairs.append((buffer.hidden()[1], fresh.hidden()[1]))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@every()
def test_a_session_may_be_asked_for_nothing(name):
    """Unattached, without a budget and closed twice: no error, and no draft longer than asked for."""
    drafter = made(name)
    assert isinstance(drafter, Drafter)
    session = drafter.start(replace(CONTEXT, prompt_ids=PROMPT))
    assert len(session.propose(0)) == 0
    session.close()
    session.close()


@every(samples)
def test_sampled_drafts_carry_their_distribution(name):
    """Each row of probs is a distribution with mass on its token; a greedy draft carries probabilities."""
    live = filled(target_of("llama"), PROMPT[:-1])
    draft = attached(made(name), live, temperature=1.0, top_p=0.9, seed=4).propose(6)
    assert draft.probs.shape == (len(draft), VOCAB)
    torch.testing.assert_close(draft.probs.sum(-1), torch.ones(len(draft)))
    assert (draft.probs[torch.arange(len(draft)), torch.tensor(draft.token_ids)] > 0).all()
    assert draft.node_probs is None
    node_probs = attached(made(name), live).propose(6).node_probs
    assert 1 >= node_probs[0] >= node_probs[-1] > 0
    assert list(node_probs) == sorted(node_probs, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False], ids=["accepted", "rejected"])
@pytest.mark.parametrize("name", ["model", "sparse window", "early exit"])
def test_a_helper_saves_forwards_and_changes_no_draft(name, right):
    """Greedy, the drafts of a cascade are those of its model alone."""
    target = target_of("llama")
    answer = plain("llama") if right else random_ids(NUM_TOKENS, seed=9)
    drafts, forwards = [], []
    for drafter in (made(name), CascadeDrafter(made(name), SuffixDrafter())):
        live, ids, found = filled(target, PROMPT[:-1]), list(PROMPT), []
        first = attached(made(name), live).propose(12).token_ids  # a text that the drafter repeats
        chunks = (*CONTEXT.chunk_ids, [*PROMPT[-40:], *first])
        session = attached(drafter, live, chunk_ids=chunks)
        for start in range(0, NUM_TOKENS - 3, 3):
            found.append(session.propose(8).token_ids)
            target.step([ids[-1], *answer[start : start + 2]], live)
            live.commit(range(3))
            ids += answer[start : start + 3]
            session.observe(TokenBlock(tuple(answer[start : start + 3])))
        drafts.append(found)
        forwards.append(session.forwards)
    assert drafts[0] == drafts[1]
    assert forwards[1] < forwards[0]
