"""`memory=`: what "auto" drafts from besides the prompt, for whom, and that it changes no answer."""

from __future__ import annotations

import time

import pytest
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations import RASD, SamplingParams
from rasd_integrations.config import RetrievalConfig, SpeculationConfig
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.prompting import PromptHints
from rasd_integrations.types import Chunk

PARAMS = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
PROMPT = "Tell me of the quick brown fox."
# Drafts of a fixed length: the schedule's own depend on the clock.
FIXED = SpeculationConfig(num_draft_tokens=6)


@pytest.fixture
def parts():
    return tiny_llama(), tiny_tokenizer()


def made(parts, **options) -> RASD:
    return RASD.from_model(*parts, speculation=FIXED, **options)


def counted(rasd, prompt=PROMPT, **known):
    """Return the answer's ids and the accepted tokens of each part."""
    found = rasd.generate(prompt, PARAMS, **known)
    assert found.stats.faults == ()
    return found.token_ids, {name: of.accepted for name, of in found.stats.drafters.items()}


def read(rasd) -> None:
    """Wait until the store of ``rasd`` is read."""
    for collection in rasd._engine.memory._collections.values():
        until = time.monotonic() + 10
        while collection._is_working:
            assert time.monotonic() < until
            time.sleep(0.002)


@pytest.fixture
def plain(parts):
    return counted(made(parts, drafter=None))[0]


def test_a_second_answer_is_drafted_from_the_first(parts, plain):
    """The same tokens, most of them accepted; also by another object over the same model."""
    first = made(parts)
    assert counted(first)[0] == plain
    ids, accepted = counted(made(parts))
    assert (ids, accepted["answers"] > 30) == (plain, True)
    assert first.forget("no such text") == 0
    assert first.forget() == 1
    assert "answers" not in counted(first)[1]


def test_the_store_is_drafted_from(parts):
    """A text of it that the prompt does not hold; not under the policy "prompt", and nothing with memory=False."""
    prompts = ["What is new?", "It is told of the quick"]
    plain = [counted(made(parts, drafter=None), prompt)[0] for prompt in prompts]

    def collected(**options) -> int:
        rasd = made(parts, store=["another text", "the quick brown fox jumps"], **options)
        assert counted(rasd, prompts[0])[0] == plain[0]  # its start has the store read
        if rasd._engine.memory is not None:
            read(rasd)
        found = rasd.generate(prompts[1], PARAMS)
        assert found.token_ids == plain[1]
        return (
            found.stats.drafters["collection"].drafted
            if "collection" in found.stats.drafters
            else 0
        )

    policy = RetrievalConfig(store_policy="prompt")
    assert collected(namespace="one") > 0
    assert collected(namespace="two", retrieval=policy) == 0
    assert collected(namespace="three", memory=False) == 0


def test_namespaces_share_nothing(parts):
    """Neither answers nor texts."""
    counted(made(parts, namespace="a"))
    assert "answers" not in counted(made(parts, namespace="b"))[1]
    assert counted(made(parts, namespace="a"))[1]["answers"] > 30


def test_retrieved_chunks_that_the_prompt_lacks_are_drafted_from(parts, plain):
    """A reranker or a compressor may have cut them; the policy "prompt" leaves them out."""
    text = parts[1].decode(plain, skip_special_tokens=False)
    hints = PromptHints(chunks=(Chunk(text),), chunk_source="retriever")

    def suffix(**options):
        return counted(made(parts, memory=False, **options), hints=hints)[1].get("suffix", 0)

    assert suffix() > suffix(retrieval=RetrievalConfig(store_policy="prompt"))


def test_a_folder_keeps_the_answers(parts, plain, tmp_path):
    """For a later process, which has another object of the model."""
    counted(made(parts, memory=tmp_path))
    later = made((tiny_llama(), parts[1]), memory=str(tmp_path))
    ids, accepted = counted(later)
    assert (ids, accepted["answers"] > 30) == (plain, True)


@pytest.mark.parametrize("memory", [None, "", "  ", 1.5, ["folder"]])
def test_another_value_is_refused(memory):
    """By name."""
    with pytest.raises(ConfigurationError, match="memory"):
        RASD("model", memory=memory)
