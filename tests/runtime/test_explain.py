"""``RASD.explain``: the answer of the call itself, whose tokens were drafted by whom, and why none were."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from fakes import ScriptedDrafter, always_wrong, empty, failing
from fakes_prompting import FACTS, RANKED, human
from scripted import scripted_model
from tiny import VOCAB, tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, Grammar, PromptHints, SamplingParams, SpeculationConfig
from rasd_integrations.decoding import decoder
from rasd_integrations.decoding.schedule import Schedule
from rasd_integrations.drafters.calibration import Allowance
from rasd_integrations.runtime import pipeline
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.types import Draft

PARAMS = SamplingParams(max_tokens=48, ignore_eos=True)
TEXT = "Tell me of the quick brown fox, the quick brown fox."
CHAT = [human(TEXT)]
FIRST = "the prefill gives the first token"
FIXED = SpeculationConfig(num_draft_tokens=6)  # the schedule's own lengths depend on the clock
# False while drafting, or a part of it, is paused
ALLOWS = f"{Allowance.__module__}.Allowance.allows"
ANSWER = f"As the text has it, {FACTS[4]} So it was Magnus, I think."


def made(drafter="auto", fixed=6, **options):
    speculation = SpeculationConfig(num_draft_tokens=fixed)
    return RASD.from_model(
        tiny_llama(), tiny_tokenizer(), drafter=drafter, speculation=speculation, **options
    )


def check_sums(answer):
    """Assert that tokens and steps are those that the statistics count."""
    stats = answer.stats
    by = Counter(token.source for token in answer.tokens)
    drafted = Counter()
    for step in answer.steps:
        drafted.update(step.drafted)
    assert {name: of.accepted for name, of in answer.drafters.items()} == {
        name: by[name] for name in answer.drafters
    }
    assert {name: of.drafted for name, of in answer.drafters.items()} == dict(drafted)
    assert by["target"] == stats.generated_tokens - stats.accepted
    assert (len(answer.steps), len(answer.tokens)) == (stats.target_steps, stats.generated_tokens)
    assert "".join(token.text for token in answer.tokens) == answer.text
    for number, step in enumerate(answer.steps):
        ids = tuple(token.token_id for token in answer.tokens if token.step == number)
        assert ids == step.token_ids
        assert bool(set(step.drafted) - {"grammar"}) == (step.off_reason is None)


@pytest.mark.parametrize("fixed", [6, None])
@pytest.mark.parametrize(
    "changes",
    [{}, {"stop": ("q",)}, {"temperature": 1.0, "seed": 3}, {"drafting": False}],
    ids=["greedy", "stop", "sampled", "plain"],
)
@pytest.mark.parametrize("prompt", [TEXT, CHAT], ids=["text", "chat"])
def test_the_answer_is_that_of_the_call(prompt, changes, fixed):
    """The same text and quotes, and each token counted once, under its drafter."""
    params, rasd = replace(PARAMS, **changes), made(fixed=fixed, memory=False)
    whole = rasd.generate(prompt, params)
    answer = rasd.explain(prompt, params)
    check_sums(answer)
    assert answer.text == whole.text
    assert answer.stats.generated_tokens >= len(whole.token_ids)
    ids = tuple(token.token_id for token in answer.tokens)
    assert ids[: len(whole.token_ids)] == whole.token_ids[: len(ids)]


def test_each_drafter_is_named(monkeypatch):
    """An answer that was given before is drafted from it, and says so at its tokens."""
    monkeypatch.setattr(ALLOWS, True)
    rasd = made()
    first = rasd.explain(CHAT, PARAMS)
    second = rasd.explain(CHAT, PARAMS)
    check_sums(second)
    assert second.text == first.text
    assert "answers" not in {token.source for token in first.tokens}
    assert Counter(token.source for token in second.tokens)["answers"] > 0
    assert rasd.stats.generated_tokens == 2 * PARAMS.max_tokens  # counted as any answer


def test_accepted_tokens_have_the_source_of_their_node():
    """Of a tree that several drafters made: wrong siblings come first, and the path changes its drafter."""
    truth = made(None).generate(TEXT, PARAMS).token_ids

    def tree(answer, budget):
        one, two = [*truth[len(answer) :], 0, 0][:2]
        wrong = (one + 1) % VOCAB
        return Draft((wrong, one, wrong, two), (-1, -1, 1, 1), sources=("a", "b", "c", "d"))

    answer = made(ScriptedDrafter(tree)).explain(TEXT, PARAMS)
    check_sums(answer)
    *whole, _, _, _ = [token.source for token in answer.tokens]  # the last step has no room for all
    assert whole == ["b", "d", "target"] * 15


@pytest.mark.parametrize("rule", [None, "mixture"], ids=["lossless", "transfer"])
def test_a_drafter_model_is_named(rule):
    """Drafting with it; where its knowledge goes into the answer, free drafters draft."""
    rasd = RASD.from_model(
        tiny_llama(), tiny_tokenizer(), drafter_model=tiny_llama(9), knowledge_transfer=rule,
        memory=False, speculation=FIXED,
    )  # fmt: skip
    answer = rasd.explain(CHAT, PARAMS)
    check_sums(answer)
    assert answer.text == rasd.generate(CHAT, PARAMS).text
    assert bool(set(answer.drafters) - {"suffix", "recycling"}) == (rule is None)


@pytest.mark.parametrize("drafting", [True, False])
def test_forced_tokens_are_the_grammars(drafting):
    """With and without a drafter."""
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["happy", "sad"]}},
        "required": ["mood"],
    }
    params = SamplingParams(max_tokens=60, grammar=Grammar.json_schema(schema), drafting=drafting)
    rasd = made()
    answer = rasd.explain(CHAT, params)
    check_sums(answer)
    assert answer.text == rasd.generate(CHAT, params).text
    forced = "".join(token.text for token in answer.tokens if token.source == "grammar")
    assert '"mood": "' in forced.replace("{", "")
    reasons = {"drafting is off for this call"} & set(answer.off_reasons)
    assert bool(reasons) == (not drafting)


def test_quotes_lie_on_their_tokens(monkeypatch):
    """Their places are those of the text, which the tokens' texts make up."""
    monkeypatch.setattr(ALLOWS, True)
    rasd = RASD.from_model(*scripted_model(lambda prompt: ANSWER), speculation=FIXED)
    prompt = [human("\n\n".join([*FACTS, "Who planned the Kullen lighthouse?"]))]
    answer = rasd.explain(prompt, SamplingParams(max_tokens=400), hints=PromptHints(chunks=RANKED))
    check_sums(answer)
    (quote,) = answer.quotes
    assert (answer.text, quote.chunk_id) == (ANSWER, "fact-4")
    assert answer.text[quote.start : quote.end] == quote.text == FACTS[4][:-1]
    assert "chunk fact-4, at character 0. source: towers.txt" in answer._repr_html_()
    spanned = answer.tokens[quote.start : quote.end]  # a byte a token
    assert [token.text for token in spanned] == list(quote.text)
    copied = [token.source for token in spanned]
    assert copied.count("suffix") > len(copied) / 2


def after(reason, steps=47):
    return {FIRST: 1, reason: steps}


NO_GAIN = "drafting does not pay on this text"
TIMED = "a plain step is timed, to compare drafts with"


@pytest.mark.parametrize(
    ("options", "changes", "reasons"),
    [
        ({"drafter": None, "fixed": None}, {}, after("no drafter")),
        ({"fixed": None}, {"drafting": False}, after("drafting is off for this call")),
        ({"fixed": 0}, {}, {"num_draft_tokens is 0": 48}),
        ({"drafter": ScriptedDrafter(empty())}, {}, {"the drafter has nothing to propose": 47, "there is no room for a draft": 1}),
        ({"drafter": ScriptedDrafter(failing(0))}, {}, {"drafter 'scripted' failed: RuntimeError: the script says so": 48}),
    ],
    ids=["none", "call", "zero", "empty", "fault"],
)  # fmt: skip
def test_where_nothing_is_drafted_it_says_why(options, changes, reasons):
    """Each step without a draft has its reason."""
    answer = made(**options).explain(TEXT, replace(PARAMS, **changes))
    assert answer.off_reasons == reasons
    check_sums(answer)


def test_a_schedule_says_why_it_does_not_draft(monkeypatch):
    """Plain steps are timed first; a draft may be too unlikely, or drafts may have cost too much."""
    made_up = ScriptedDrafter(always_wrong([0] * 99, VOCAB))
    monkeypatch.setattr(Schedule, "head", lambda self, draft: 0)
    monkeypatch.setattr(ALLOWS, True)
    assert made(made_up, None).explain(TEXT, PARAMS).off_reasons == {
        FIRST: 1, TIMED: 2, "the draft is too unlikely to save time": 44, "there is no room for a draft": 1,
    }  # fmt: skip
    monkeypatch.setattr(ALLOWS, False)
    assert made(made_up, None).explain(TEXT, PARAMS).off_reasons == after(NO_GAIN)


def test_a_draft_that_the_grammar_forbids_is_told():
    """All of it was cut, so none was verified."""
    letters = ScriptedDrafter(always_wrong([ord("z")] * 99, VOCAB))  # "{", which is no letter
    params = SamplingParams(max_tokens=20, grammar=Grammar("regex", "[a-z]{9}"))
    reasons = made(letters).explain(CHAT, params).off_reasons
    assert reasons["the grammar allows no token of the draft"] > 5


def test_calls_that_are_not_explained_record_nothing(monkeypatch):
    """No record is made and no block split."""

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(decoder, "StepRecord", fail)
    monkeypatch.setattr(pipeline, "by_token", fail)
    rasd = made()
    assert rasd.generate(CHAT, PARAMS).text
    assert list(rasd.stream(CHAT, PARAMS))
    with pytest.raises(AssertionError):
        rasd.explain(CHAT, PARAMS)


def test_a_request_is_explained_as_it_is():
    """Its own params and tools count."""
    answer = made().explain(Request(CHAT, replace(PARAMS, max_tokens=5)))
    assert len(answer.tokens) == 5
