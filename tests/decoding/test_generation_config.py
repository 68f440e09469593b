"""What a checkpoint's generation_config asks for is what ``generate`` of the same model does, whatever is drafted."""

from __future__ import annotations

import logging
from collections import Counter

import fakes
import pytest
import torch
from fakes import ScriptedDrafter
from fakes_distributions import Model, distance, outcomes
from tiny import EOS, VOCAB, tiny_gemma3, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig, LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import NoRepeatNGramLogitsProcessor

from rasd_integrations import RASD, ConfigurationError, SamplingParams
from rasd_integrations.config import SpeculationConfig
from rasd_integrations.decoding.decoder import SpeculativeDecoder
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.constraints import processed_rows
from rasd_integrations.engine.verification.exact import block_verify, sample_and_walk
from rasd_integrations.engine.verification.sampling import sampling_distribution
from rasd_integrations.types import Draft

PROMPT = [*range(40, 60), *range(45, 55), 7, 8, 45, 46]
NUM_TOKENS = 24
ASKED = {
    "penalty": {"repetition_penalty": 1.3},
    "ngrams": {"no_repeat_ngram_size": 2},
    "suppressed": {"suppress_tokens": list(range(0, VOCAB, 3))},
    "first": {"begin_suppress_tokens": list(range(250))},
    "bad words": {"bad_words_ids": [[5], [46, 47], *([i] for i in range(60, 200))]},
    "bias": {"sequence_bias": [[[12], 9.0], [[45, 46], -20.0], [[7], 4.0]]},
    "no early end": {"min_new_tokens": 12, "eos_token_id": list(range(0, VOCAB, 2))},
    "many ends": {"eos_token_id": [EOS, 245, 7]},
    "decay": {"exponential_decay_length_penalty": [5, 1.4]},
    "length": {"max_new_tokens": 9},
    "all": {
        "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "suppress_tokens": [1, 2, 3, 46],
        "bad_words_ids": [[45, 46]], "min_new_tokens": 3, "eos_token_id": [EOS, 11, 12],
    },
}  # fmt: skip
DRAFTS = {
    "none": None,
    "oracle": fakes.oracle,
    "wrong": lambda truth: fakes.always_wrong(truth, VOCAB),
    "random": lambda truth: fakes.random_tokens(VOCAB),
    "trees": lambda truth: fakes.as_tree(fakes.partly_right(truth, VOCAB), VOCAB),
    "random trees": lambda truth: fakes.as_tree(fakes.random_tokens(VOCAB), VOCAB),
}


def model_with(asked, make=tiny_llama):
    model = make()
    model.generation_config = GenerationConfig(
        **{"eos_token_id": EOS, "pad_token_id": EOS, **asked}
    )
    return model


def generated(model, prompt, **options):
    most = {} if model.generation_config.max_new_tokens else {"max_new_tokens": NUM_TOKENS}
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **{**most, **options})
    return out[0, len(prompt) :].tolist()


def decoded(decoder, prompt, **options):
    params = SamplingParams(**options)
    return [token for block in decoder.generate(prompt, params) for token in block.token_ids]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "make"), [*((name, tiny_llama) for name in sorted(ASKED)), ("all", tiny_gemma3)]
)
def test_greedy_answers_are_those_of_generate(asked, make):
    """Fault 27: chains and trees, right and wrong, several answers in a row, with the prefix cached."""
    model = model_with(ASKED[asked], make)
    options = {} if "max_new_tokens" in ASKED[asked] else {"max_tokens": NUM_TOKENS}
    prompts = [PROMPT, [*PROMPT, 9, 9, 10]]
    truths = [generated(model, prompt) for prompt in prompts]
    target = TargetModel(model)
    for kind, script in DRAFTS.items():
        cache = PrefixCache(1 << 24)
        for prompt, truth in zip(prompts * 2, truths * 2, strict=True):
            drafter = None if script is None else ScriptedDrafter(script(truth))
            decoder = SpeculativeDecoder(
                target, drafter, prefix_cache=cache, config=SpeculationConfig(num_draft_tokens=6 if drafter else None)
            )  # fmt: skip
            assert decoded(decoder, prompt, **options) == truth, kind


def test_what_is_asked_changes_the_answers():
    """Each case of the table is one: without its config the answer is another."""
    plain = generated(model_with({}), PROMPT)
    for name, asked in ASKED.items():
        assert generated(model_with(asked), PROMPT) != plain, name


def test_what_a_call_sets_goes_first():
    """Fault 27: options that are given count, also where they turn something off."""
    model = model_with({**ASKED["all"], "max_new_tokens": 5, "suppress_tokens": None, "bad_words_ids": None,
                        "min_new_tokens": None})  # fmt: skip
    decoder = SpeculativeDecoder(TargetModel(model), None)
    assert len(decoded(decoder, PROMPT, ignore_eos=True)) == 5
    off = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "max_tokens": NUM_TOKENS}
    bare = model_with({"eos_token_id": [EOS, 11, 12]})
    assert decoded(decoder, PROMPT, **off) == generated(bare, PROMPT)
    wholly = model_with(ASKED["all"])
    passed = decoded(
        SpeculativeDecoder(TargetModel(wholly), None), PROMPT, max_tokens=NUM_TOKENS, use_generation_config=False
    )  # fmt: skip
    assert passed == generated(bare, PROMPT)


def test_a_call_may_ask_for_penalties_itself():
    """The options are those of ``generate``."""
    model = model_with({})
    decoder = SpeculativeDecoder(TargetModel(model), ScriptedDrafter(fakes.random_tokens(VOCAB)))
    options = {"repetition_penalty": 1.25, "no_repeat_ngram_size": 3}
    assert decoded(decoder, PROMPT, max_tokens=NUM_TOKENS, **options) == generated(
        model, PROMPT, **options
    )


SAMPLES = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1}


def test_a_checkpoint_that_samples_is_sampled():
    """Fault 27: temperature, top_p, top_k and min_p count where the call sets none; 0 asks for greedy."""
    model = model_with(SAMPLES)
    decoder = SpeculativeDecoder(TargetModel(model), None)
    drawn = {tuple(decoded(decoder, PROMPT, max_tokens=8, seed=seed)) for seed in range(8)}
    assert len(drawn) > 1
    greedy = generated(model_with({}), PROMPT, max_new_tokens=8)
    assert decoded(decoder, PROMPT, max_tokens=8, temperature=0.0) == greedy
    assert SamplingParams().settled({}).temperature == 0
    torch.manual_seed(0)
    theirs = Counter(generated(model, PROMPT, max_new_tokens=1)[0] for _ in range(150))
    ours = Counter(decoded(decoder, PROMPT, max_tokens=1, seed=n)[0] for n in range(150))
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[token] - theirs[token]) < 40 for token in ours)


def test_a_checkpoint_that_samples_without_top_k_takes_that_of_generate():
    """Transformers cuts to 50 tokens where a checkpoint samples and says nothing else."""
    model = model_with({"do_sample": True})
    decoder = SpeculativeDecoder(TargetModel(model), None)
    drawn = {
        decoded(decoder, PROMPT, max_tokens=1, seed=n, temperature=50.0)[0] for n in range(300)
    }
    assert 20 < len(drawn) <= 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "tree", "sampled chain"])
@pytest.mark.parametrize("seed", range(3))
def test_processed_rows_are_followed_exactly(oracle, kind, seed):
    """Fault 27: by enumeration, a node's distribution is processed with the node's own path before it."""
    vocab, prompt = 4, [0, 1, 2]
    model, drafts = Model(seed, vocab), Model(seed + 50, vocab)
    for table in (model, drafts):
        table.logits = lambda prefix, logits=table.logits: logits(prefix).nan_to_num(neginf=-2.0)
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.7), NoRepeatNGramLogitsProcessor(3)]
    )
    distribution = sampling_distribution(0.9, 0.97, 0, 0.05)

    def p(path):
        row = processed_rows(processors, model.logits(path)[None], [*prompt, *path], Draft(), None)
        return distribution(row)[0].double()

    tree = Draft((1, 2, 2, 0, 1), parents=(-1, -1, 0, 0, 2))
    draft = tree if kind == "tree" else Draft((2, 1, 3))
    paths = [()]
    for node, parent in enumerate(draft.parent_of):
        paths.append((*paths[parent + 1], draft.token_ids[node]))

    def one_answer():
        drafted = draft
        if kind == "sampled chain":
            q = [drafts.logits(()).softmax(-1)]
            path = ()
            for _ in range(2):
                path = (*path, int(oracle.draw(q[-1], None)))
                q.append(drafts.logits(path).softmax(-1))
            drafted = Draft(path, probs=torch.stack(q[:-1]))
            rows = [model.logits(path[:n]) for n in range(len(path) + 1)]
        else:
            rows = [model.logits(path) for path in paths]
        logits = processed_rows(processors, torch.stack(rows), prompt, drafted, None)
        verify = block_verify if kind == "sampled chain" else sample_and_walk
        verdict = verify(logits, drafted, distribution, None)
        accepted = [drafted.token_ids[n] for n in verdict.accepted]
        return (*accepted, verdict.token_id)

    got = outcomes(oracle, one_answer)
    length = max(map(len, got))
    assert distance(extended(got, p, length), extended({(): 1.0}, p, length)) < 1e-6


def extended(distribution, p, length):
    full, todo = Counter(), dict(distribution)
    while todo:
        prefix, weight = todo.popitem()
        if len(prefix) == length:
            full[prefix] += weight
            continue
        for token, chance in enumerate(p(prefix).tolist()):
            if chance > 0:
                todo[(*prefix, token)] = todo.get((*prefix, token), 0.0) + weight * chance
    return full


def test_stop_strings_of_a_checkpoint_end_answers():
    """Fault 27: they are the default of ``stop``; a call's own take their place."""
    model, tokenizer = model_with({"do_sample": False}), tiny_tokenizer()
    rasd = RASD.from_model(model, tokenizer)
    whole = rasd.generate("The cat", SamplingParams(max_tokens=30)).text
    mark = whole[5:8]
    model.generation_config.stop_strings = [mark]
    assert rasd.generate("The cat", SamplingParams(max_tokens=30)).text == whole.split(mark)[0]
    assert rasd.generate("The cat", SamplingParams(max_tokens=30, stop=())).text == whole


def test_what_is_not_followed_is_warned_of_once(caplog):
    """Fault 27: by name and value; what is followed is told at a lower level, what changes nothing not at all."""
    model = model_with(
        {"num_beams": 4, "num_return_sequences": 3, "guidance_scale": 1, "repetition_penalty": 1.2}
    )
    decoder = SpeculativeDecoder(TargetModel(model), None)
    with caplog.at_level(logging.INFO, "rasd_integrations"):
        for _ in range(3):
            decoded(decoder, PROMPT, max_tokens=2)
    ours = [r for r in caplog.records if r.name.startswith("rasd_integrations")]
    (warned,) = [r.getMessage() for r in ours if r.levelno == logging.WARNING]
    assert "num_beams=4" in warned
    assert "num_return_sequences=3" in warned
    assert "guidance_scale" not in warned
    assert "typical_p" not in warned
    (told,) = [r.getMessage() for r in ours if r.levelno == logging.INFO]
    assert "repetition_penalty=1.2" in told


@pytest.mark.parametrize(
    "asked", [{"bad_words_ids": [[99999]]}, {"sequence_bias": [[[99999], 1.0]]}, {"top_p": 7.0}]
)
def test_a_config_that_cannot_be_followed_is_refused(asked):
    """Before the answer begins, and in our words."""
    model = model_with({})
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    decoder = SpeculativeDecoder(TargetModel(model), None)
    with pytest.raises(ConfigurationError, match=r"generation_config|top_p"):
        decoded(decoder, PROMPT, max_tokens=2)
    assert decoded(decoder, PROMPT, max_tokens=2, use_generation_config=False)


def test_a_grammar_goes_before_what_a_checkpoint_forbids():
    """Where both leave no token, the grammar's stand: the answer is whole."""
    from rasd_integrations import Grammar

    model = model_with({"no_repeat_ngram_size": 1, "suppress_tokens": list(range(0, 256, 2))})
    rasd = RASD.from_model(model, tiny_tokenizer())
    bound = SamplingParams(max_tokens=30, grammar=Grammar("regex", "(aaa|bbb)abab"))
    assert rasd.generate("Say it", bound).text in {"aaaabab", "bbbabab"}
