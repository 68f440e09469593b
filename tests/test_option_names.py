"""An unknown option is answered with the one that was meant."""

from __future__ import annotations

import pytest
from tiny import tiny_llama

from rasd_integrations import RASD
from rasd_integrations.config import RetrievalConfig, SamplingParams, SpeculationConfig, updated
from rasd_integrations.errors import ConfigurationError, RASDError

MEANT = {
    "device": r"model_kwargs=\{'device_map': \.\.\.\}",
    "torch_dtype": r"model_kwargs=\{'dtype': \.\.\.\}",
    "load_in_4bit": "quantization_config",
    "revision": r"model_kwargs=\{'revision': \.\.\.\}",
    "hf_token": r"model_kwargs=\{'token': \.\.\.\}",
    "context_window": "the window is the model's own",
    "n_ctx": "the window is the model's own",
    "generate_kwargs": "temperature=, top_p=",
    "pipeline_kwargs": "temperature=, top_p=",
    "tokenizer_name": "from_model",
    "model_name": "'model'",
    "model_id": "'model'",
    "assistant_model": "'drafter'",
    "vectorstore": "'store'",
    "retriever": "'store'",
    "enable_thinking": r"chat_template_kwargs=\{'enable_thinking': \.\.\.\}",
    "api_key": "Leave it out",
    "drafte": "'drafter'",
}


@pytest.mark.parametrize("name", MEANT)
def test_other_integrations_names_are_known(name):
    """Fault 16: the error names the option that was meant, not the one that looks alike."""
    with pytest.raises(ConfigurationError, match=MEANT[name]) as caught:
        RASD("some/model", **{name: "x"})
    assert f"Unknown option {name!r} for RASD" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_new_tokens", "'max_tokens'"),
        ("stop_sequences", "'stop'"),
        ("do_sample", "temperature: 0 is greedy"),
        ("random_seed", "'seed'"),
    ],
)
def test_a_calls_options_too(name, meant):
    """Fault 16: the same table answers an option of one call."""
    with pytest.raises(ConfigurationError, match=meant):
        updated(SamplingParams(), {name: 1}, "a call")


@pytest.mark.parametrize("option", ["chat_template_kwargs", "model_kwargs"])
def test_an_option_of_the_llm_is_not_passed_on(option):
    """Fault 16: an option of an answer among those that go elsewhere is refused, not swallowed."""
    with pytest.raises(ConfigurationError, match=f"{option} has 'temperature'"):
        RASD("some/model", **{option: {"temperature": 0.5}})


@pytest.mark.parametrize("options", [{}, {"model": ""}, {"model": 3}])
def test_a_missing_model_is_named(options):
    """Fault 16: no bare TypeError of Python's."""
    with pytest.raises(ConfigurationError, match="model"):
        RASD(**options)


def test_what_from_pretrained_does_not_take_is_named(tmp_path):
    """Fault 16: ``model_kwargs={"device": ...}`` is no fault of the files."""
    from tiny import tiny_tokenizer

    tiny_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RASDError, match=r"model_kwargs has 'device'.*device_map") as caught:
        RASD.load(tmp_path, model_kwargs={"device": "cpu"})
    assert "files" not in str(caught.value)


def test_defaults_are_the_documented_ones():
    """An answer is greedy, of 512 tokens, lossless, and its drafter sees no chunk that is not in the prompt."""
    answer, drafts, store = SamplingParams().settled({}), SpeculationConfig(), RetrievalConfig()
    assert (answer.temperature, answer.top_p, answer.top_k, answer.min_p) == (0, 1, 0, 0)
    assert (answer.repetition_penalty, answer.no_repeat_ngram_size) == (1, 0)
    assert (answer.max_tokens, answer.stop, answer.seed) == (512, (), None)
    assert (drafts.lossless, drafts.num_draft_tokens, drafts.max_draft_tokens) == (True, None, 16)
    assert (store.k, store.timeout_s, store.store_policy) == (16, 2.0, "store")
