"""The framework-free face: lazy, shared, one path from prompt to text, and honest about bad input."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import fakes
import pytest
from fakes import ScriptedDrafter
from fakes_vocabulary import merged, model_of
from tiny import WINDOW, tiny_llama, tiny_tokenizer

from rasd_integrations import (
    RASD,
    ConfigurationError,
    ContextOverflowError,
    DecodingError,
    ModelLoadError,
    PromptError,
    PromptHints,
    RetrievalConfig,
    SamplingParams,
    SpeculationConfig,
    VocabularyMismatchError,
)
from rasd_integrations.runtime import models
from rasd_integrations.runtime.models import shared_model

PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
DOCS = [
    f"Room {i} holds the {w} and its keeper, who sleeps. " * 3
    for i, w in enumerate(("owl", "fox", "eel", "yak", "ant", "bee"))
]
CHAT = [{"role": "user", "content": "\n\n".join(DOCS) + "\n\nQuestion: who holds the eel?"}]
SOON = RetrievalConfig(gate_tokens=64, chunk_tokens=64, max_share=0.3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in a folder, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make(**options) -> RASD:
    return RASD.from_model(tiny_llama(), tiny_tokenizer(), **options)


@pytest.fixture(scope="module")
def plain_text() -> str:
    return make(drafter=None).generate(CHAT, PARAMS).text


def test_construction_loads_nothing():
    """A model that does not exist is missed at the first call only."""
    rasd = RASD("./no/such/folder")
    with pytest.raises(ModelLoadError, match="no file or folder"):
        rasd.generate("x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stor": []}, "Did you mean 'store'"),
        ({"drafter": 7}, "drafter is 7"),
        ({"drafter": ScriptedDrafter}, r"ScriptedDrafter'>, but must be .* object \(not a class\)"),
        ({"context": "paper"}, "'prompt' or 'documents'"),
        ({"knowledge_transfer": 5.0}, "give 'rapid:5.0'"),
        (
            {
                "knowledge_transfer": "rapid",
                "speculation": SpeculationConfig(knowledge_transfer="mixture"),
            },
            "give one of them",
        ),
        ({"prefix_cache_bytes": -1}, "at least 0"),
    ],
)
def test_bad_options_are_refused_at_construction(options, message):
    """An option is honoured or refused, never ignored."""
    with pytest.raises(ConfigurationError, match=message):
        RASD("m", **options)


def test_wrappers_of_one_model_share_its_weights(saved):
    """Two instances load once, and the weights go with the last of them."""
    kwargs = {"dtype": "float32"}
    first, second = (
        RASD.load(saved, model_kwargs=kwargs),
        RASD(saved, model_kwargs=kwargs, drafter=None),
    )
    assert first.generate("abc", PARAMS).text == second.generate("abc", PARAMS).text
    target = weakref.ref(shared_model(str(saved), kwargs).target)
    assert first._engine._decoder.target is second._engine._decoder.target
    first.close()
    assert target() is not None
    second.close()
    del first, second
    gc.collect()
    assert target() is None


def test_closed_instance_says_so():
    """After close a call raises."""
    with make() as rasd:
        pass
    with pytest.raises(DecodingError, match="was closed"):
        rasd.generate("x", PARAMS)


@pytest.mark.parametrize("drafter", ["auto", "self", None])
async def test_every_form_gives_the_same_text(drafter, plain_text):
    """Stream, generate and their asynchronous forms are one path, whatever drafts."""
    rasd = make(drafter=drafter, store=DOCS, retrieval=SOON)
    chunks = list(rasd.stream(CHAT, PARAMS))
    assert "".join(c.text for c in chunks) == plain_text
    assert rasd.generate(CHAT, PARAMS).text == plain_text
    assert (await rasd.agenerate(CHAT, PARAMS)).text == plain_text
    assert "".join([c.text async for c in rasd.astream(CHAT, PARAMS)]) == plain_text
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "length"


def test_self_drafter_reads_a_short_prompt():
    """RAPID's drafter gets retrieved chunks in place of the long context, and says so."""
    rasd = make(
        drafter="self",
        store=DOCS,
        retrieval=SOON,
        speculation=SpeculationConfig(num_draft_tokens=3),
    )
    stats = rasd.generate(CHAT, PARAMS).stats
    assert 0 < stats.drafter_prompt_tokens < 0.5 * stats.prompt_tokens
    assert (stats.chunk_source, stats.drafters["model"].drafted > 0) == ("store", True)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter model whose ids mean other tokens, in a folder."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = merged()
    model_of(tokenizer, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafter_model_of_another_family_drafts(saved, foreign, temperature):
    """Its drafts are translated, and greedy the text is the target's; it reads the short prompt in its own ids."""
    options = {"model_kwargs": {"dtype": "float32"}, "store": DOCS, "retrieval": SOON}
    params = replace(PARAMS, temperature=temperature, seed=3)
    three = SpeculationConfig(num_draft_tokens=3)
    answer = RASD.load(saved, drafter=foreign, speculation=three, **options).generate(CHAT, params)
    drafted = answer.stats.drafters["projection" if temperature else "bridge"].drafted
    assert (drafted > 0, answer.stats.drafter_prompt_tokens > 0) == (True, True)
    assert answer.stats.faults == ()
    if not temperature:
        assert answer.text == RASD(saved, drafter=None, **options).generate(CHAT, params).text


def test_a_drafter_model_stands_once_however_many_use_it(saved, foreign):
    """A second instance finds it while the first one lives; it is let go with the last."""
    first, second = (RASD.load(saved, drafter=foreign) for _ in range(2))
    model = weakref.ref(first._engine._drafter_model)
    assert model() is second._engine._drafter_model is not None
    first.close()
    assert model() is not None
    second.close()
    gc.collect()
    assert model() is None


def test_drafter_model_with_more_tokens_needs_no_translation(saved, tmp_path):
    """Tokens that only the drafter has do no harm."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tiny_llama(1, vocab_size=260).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    three = SpeculationConfig(num_draft_tokens=3)
    rasd = RASD.load(saved, drafter=tmp_path, speculation=three)
    assert rasd.generate(CHAT, PARAMS).stats.drafters["model"].drafted > 0


@pytest.mark.parametrize(
    "lossy",
    [
        {"knowledge_transfer": "rapid"},
        {"speculation": SpeculationConfig(knowledge_transfer="mixture")},
    ],
)
def test_a_distribution_that_needs_the_drafters_is_refused_with_another_family(
    saved, foreign, lossy
):
    """Knowledge transfer leans on a distribution over the target's tokens, which such a drafter does not have."""
    with pytest.raises(
        VocabularyMismatchError, match=r"token '.*' is id .*target's family or 'self'"
    ):
        RASD.load(saved, drafter=foreign, **lossy)


def test_a_call_may_not_lean_towards_a_drafter_of_another_family(saved, foreign):
    """The same for a single call."""
    rasd = RASD.load(saved, drafter=foreign)
    with pytest.raises(ConfigurationError, match="cannot be its teacher"):
        rasd.generate(CHAT, replace(PARAMS, knowledge_transfer="cautious"))


def test_drafter_model_drafts(plain_text):
    """Another model of the same vocabulary drafts, and the text is the target's."""
    rasd = RASD.from_model(
        tiny_llama(), tiny_tokenizer(), tiny_llama(9), store=DOCS, retrieval=SOON,
        speculation=SpeculationConfig(num_draft_tokens=3),
    )  # fmt: skip
    answer = rasd.generate(CHAT, PARAMS)
    assert answer.text == plain_text
    assert answer.stats.drafters["model"].drafted > 0


def test_knowledge_transfer_is_reported_with_its_bound():
    """A lossy answer says that it is one."""
    rasd = make(store=DOCS, retrieval=SOON, knowledge_transfer="rapid:500")
    stats = rasd.generate(CHAT, PARAMS).stats
    assert stats.mode == "knowledge_transfer"
    assert stats.as_dict()["tv_bound"] > 0


@pytest.mark.parametrize(
    ("options", "call"),
    [({}, {}), ({"drafter": None}, {}), ({"drafter": "self"}, {"drafting": False})],
)
def test_any_engine_transfers_for_a_call(options, call):
    """The target itself reads the chunks, with drafts for speed and without."""
    rasd = RASD.from_model(
        tiny_llama(), tiny_tokenizer(), store=DOCS, retrieval=SOON, memory=False, **options
    )
    params = SamplingParams(max_tokens=20, knowledge_transfer="mixture:0", **call)
    steered = rasd.generate(CHAT, params).stats
    assert (steered.mode, steered.transfer_off_reason) == ("knowledge_transfer", None)
    assert steered.drafter_prompt_tokens > 0
    assert 0 < steered.changed_share <= 1
    assert rasd.generate(CHAT, replace(params, knowledge_transfer=None)).stats.mode == "lossless"


def test_users_own_drafter_is_used(plain_text):
    """An object with the protocol drafts."""
    drafter = ScriptedDrafter(fakes.random_tokens(256))
    answer = make(drafter=drafter).generate(CHAT, PARAMS)
    assert answer.text == plain_text
    assert answer.stats.drafters["s"].drafted > 0


def test_statistics_add_up():
    """The instance's counters are the sum of its answers'."""
    rasd = make()
    answers = [rasd.generate(text, PARAMS).stats for text in ("abc", "abd")]
    assert rasd.stats.generated_tokens == 48
    assert rasd.stats.target_steps == sum(a.target_steps for a in answers)


def test_second_question_reuses_the_document():
    """The shared head of two prompts is prefilled once."""
    rasd = make()
    for i, question in enumerate(("who is it?", "where is it?")):
        stats = rasd.generate([{"role": "user", "content": DOCS[0] * 4 + question}], PARAMS).stats
        assert (stats.cached_prompt_tokens > 400) == (i == 1)


@pytest.mark.parametrize(("free", "kept"), [(1 << 30, True), (1 << 10, False)])
def test_the_prefix_cache_takes_a_share_of_the_free_memory(monkeypatch, free, kept):
    """Where little memory is free, no prompt is kept; what is free later changes nothing."""
    monkeypatch.setattr(models, "memory_available", lambda device: free)
    asked = [{"role": "user", "content": DOCS[0] * 4}]
    loaded = tiny_llama(), tiny_tokenizer()
    first = RASD.from_model(*loaded)
    first.generate(asked, PARAMS)
    monkeypatch.setattr(models, "memory_available", lambda device: (1 << 40) // free)
    second = RASD.from_model(*loaded, drafter=None)
    for rasd in (first, second, second):
        assert (rasd.generate(asked, PARAMS).stats.cached_prompt_tokens > 400) == kept


def test_warm_prefills_ahead_of_the_question():
    """A warmed document is found by the first question on it."""
    rasd = make()
    rasd.warm([DOCS[0] * 4])
    stats = rasd.generate([{"role": "user", "content": DOCS[0] * 4 + "\n\nwho?"}], PARAMS).stats
    assert stats.cached_prompt_tokens > len(DOCS[0]) * 4


def test_stop_strings_end_the_answer(plain_text):
    """The text ends before the stop string."""
    stop = plain_text[6:9]
    params = SamplingParams(max_tokens=24, ignore_eos=True, stop=(stop,))
    answer = make().generate(CHAT, params)
    assert (answer.text, answer.finish_reason) == (plain_text[: plain_text.index(stop)], "stop")


def test_overflow_names_the_figures():
    """Prompt and answer over the window raise when called."""
    with pytest.raises(ContextOverflowError, match=f"window is {WINDOW}"):
        make().stream("x" * WINDOW, PARAMS)


@pytest.mark.parametrize("prompt", ["", [], [{"role": "user", "content": ""}]])
def test_empty_prompts_are_refused(prompt):
    """There must be something to answer."""
    with pytest.raises(PromptError):
        make().stream(prompt, PARAMS)


def raising(query, k):
    raise ConnectionError(query)


@pytest.mark.parametrize(
    "store",
    [raising, lambda q, k: 7, lambda q, k: [None, 3, ""]],
    ids=["raises", "no-list", "no-texts"],
)
def test_broken_store_costs_no_answer(store, plain_text):
    """A store that raises or returns nonsense is reported, and the answer is right."""
    rasd = make(drafter="self", store=store, retrieval=SOON)
    answer = rasd.generate(CHAT, PARAMS)
    assert answer.text == plain_text
    assert answer.stats.faults != ()


def test_explicit_hints_are_used():
    """What a caller knows goes before what is guessed."""
    rasd = make(drafter="self", store=DOCS, retrieval=SOON)
    hints = PromptHints(question="who holds the eel?", question_source="explicit")
    assert rasd.generate(CHAT, PARAMS, hints=hints).stats.question_source == "explicit"


def test_identity_tells_models_and_modes_apart():
    """Cache keys differ where outputs may differ, and only there."""
    one, two = RASD("a"), RASD("b")
    assert one.identity != two.identity
    assert one.identity == RASD("a", drafter=None).identity
    assert one.identity != RASD("a", knowledge_transfer="rapid:3").identity
    assert (
        RASD("a", knowledge_transfer="rapid:3").identity
        != RASD("a", knowledge_transfer="rapid").identity
    )


async def test_cancelled_stream_stops_and_leaves_the_engine_free(plain_text):
    """A cancelled task ends its decoding within a step; the next answer is right."""
    rasd = make()
    long = SamplingParams(max_tokens=1500, ignore_eos=True)

    async def consume():
        async for _ in rasd.astream("abc", long):
            pass

    task = asyncio.create_task(consume())
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(100):
        if rasd.stats.target_steps:
            break
        await asyncio.sleep(0.05)
    assert 0 < rasd.stats.generated_tokens < 1500
    assert (await rasd.agenerate(CHAT, PARAMS)).text == plain_text


async def test_concurrent_streams_equal_their_sequential_answers():
    """Eight streams at once give what each gives alone."""
    rasd = make()
    prompts = [f"prompt number {i} " * 5 for i in range(8)]
    alone = [rasd.generate(p, PARAMS).text for p in prompts]
    together = await asyncio.gather(*(rasd.agenerate(p, PARAMS) for p in prompts))
    assert [g.text for g in together] == alone


async def test_errors_reach_the_asynchronous_caller():
    """An error in the thread is raised in the task."""
    with pytest.raises(PromptError):
        await make().agenerate("", PARAMS)


def test_window_and_template_are_known_without_weights(saved):
    """The config and the tokenizer are enough."""
    rasd = RASD(saved)
    assert (rasd.window, rasd.has_chat_template, rasd.count_tokens("abc")) == (WINDOW, True, 3)
    assert rasd._engine._decoder is None


def test_hanging_store_is_left_behind(plain_text):
    """A store that hangs costs its timeout once, not the answer."""
    release = threading.Event()

    def hang(query: str, k: int) -> list[str]:
        release.wait(20)
        return DOCS

    retrieval = RetrievalConfig(gate_tokens=64, chunk_tokens=64, max_share=0.3, timeout_s=0.2)
    rasd = make(drafter="self", store=hang, retrieval=retrieval)
    answer = rasd.generate(CHAT, PARAMS)
    release.set()
    assert answer.text == plain_text
    assert 0.2 <= answer.stats.retrieve_s < 5
    assert "0.2" in " ".join(answer.stats.faults)
