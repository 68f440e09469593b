"""The LlamaIndex LLM's options and life cycle, over an engine that only writes down what it was asked."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import json
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import TEXT, USER, call_of
from llama_index.core import Settings
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.schema import TextNode

from rasd_integrations.config import RetrievalConfig, SamplingParams, SpeculationConfig
from rasd_integrations.drafters import SuffixDrafter
from rasd_integrations.errors import ConfigurationError, MissingDependencyError
from rasd_integrations.llama_index import RASDLLM, configure_settings
from rasd_integrations.response_format import Grammar

pytestmark = pytest.mark.usefixtures("fake_engine")

# --- options --------------------------------------------------------------------------------------


async def test_options_of_a_call_are_honoured_on_every_endpoint(llm):
    """Sampling options of one call go over the fields."""
    options = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "max_new_tokens": 8,
        "stop": ["\n"],
        "seed": 3,
    }
    llm.complete("Who?", **options)
    list(llm.stream_complete("Who?", **options))
    await llm.acomplete("Who?", **options)
    await llm.astream_complete("Who?", **options)
    llm.chat(USER, **options)
    list(llm.stream_chat(USER, **options))
    await llm.achat(USER, **options)
    await llm.astream_chat(USER, **options)

    expected = SamplingParams(
        temperature=0.5, top_p=0.9, top_k=4, max_tokens=8, stop=("\n",), seed=3
    )
    assert [expected] * 8 == [call.params for call in llm._rasd.calls]


def test_fields_hold_where_a_call_says_nothing():
    """The constructor's sampling options are the default, and a call's None means the same."""
    llm = RASDLLM(
        "m", temperature=0.2, top_p=0.8, top_k=2, max_new_tokens=9, stop=["#", "\n\n"], seed=1
    )
    llm.complete("Who?", temperature=None, stop=None)

    expected = SamplingParams(
        temperature=0.2, top_p=0.8, top_k=2, max_tokens=9, stop=("#", "\n\n"), seed=1
    )
    assert expected == call_of(llm).params


def test_a_call_may_go_without_drafts(llm):
    """``drafter=None`` is plain decoding for one call; the LLM's own drafter means the same as nothing."""
    llm.complete("Who?", drafter=None)
    llm.complete("Who?", drafter="auto")
    llm.complete("Who?", knowledge_transfer=2.0)

    params = [call.params for call in llm._rasd.calls]
    assert [(False, None), (True, None), (True, 2.0)] == [
        (p.drafting, p.knowledge_transfer) for p in params
    ]


def test_sampling_fields_may_be_changed_later(llm):
    """A field set after construction counts from the next call on."""
    llm.temperature = 0.7
    llm.complete("Who?")

    assert call_of(llm).params.temperature == 0.7


def test_engine_fields_may_not(llm):
    """A change that could have no effect is refused."""
    with pytest.raises(ValueError, match="frozen"):
        llm.drafter = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "Did you mean 'temperature'"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"context": "all"}, "context is 'all'"),
        ({"max_tokens": 8, "max_new_tokens": 9}, "max_tokens is 8 and max_new_tokens is 9"),
        (
            {"num_draft_tokens": 2, "speculation": SpeculationConfig(num_draft_tokens=3)},
            "num_draft_tokens is 2 and speculation.num_draft_tokens is 3",
        ),
        ({"_loaded": (0, 0, 0), "model_kwargs": {"dtype": "float32"}}, "come too late"),
    ],
)
def test_a_constructor_refuses(options, message):
    """Unknown options, bad values and contradictions are named when the LLM is made."""
    with pytest.raises(ConfigurationError, match=message):
        RASDLLM("m", **options)


def test_a_loaded_model_is_not_taken_for_a_name():
    """Who passes an object is told of ``from_model``."""
    with pytest.raises(ConfigurationError, match=r"RASDLLM\.from_model"):
        RASDLLM(object())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 1}, "Did you mean 'max_tokens'"),
        ({"tool": []}, "Unknown option 'tool'"),
        ({"drafter": "small/model"}, "drafter is 'small/model' for one call"),
        ({"knowledge_transfer": -1}, "knowledge_transfer is -1"),
        ({"response_format": {"type": "xml"}}, "response_format is"),
        (
            {"response_format": {"type": "json_object"}, "grammar": Grammar.json_object()},
            "give one of them",
        ),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"stop": 5}, "wrong type"),
        ({"rasd": {"question": 1}}, "must be text"),
        ({"rasd": {"quesion": "?"}}, "Did you mean 'question'"),
        ({"rasd": "question"}, "rasd is 'question'"),
        ({"rasd": {"chunks": [1]}}, "is a int"),
    ],
)
async def test_a_call_refuses(llm, options, message):
    """An option that a call cannot honour is refused, whole or streamed, sync or async."""
    with pytest.raises(ConfigurationError, match=message):
        llm.chat(USER, **options)
    with pytest.raises(ConfigurationError, match=message):
        llm.stream_complete("Who?", **options)
    with pytest.raises(ConfigurationError, match=message):
        await llm.achat(USER, **options)
    with pytest.raises(ConfigurationError, match=message):
        await llm.astream_complete("Who?", **options)


def test_engine_options_reach_the_engine():
    """What the constructor is given is handed on under the same names."""
    retrieval = RetrievalConfig(k=3)
    llm = RASDLLM(
        Path("models") / "m.gguf",
        drafter="org/small",
        drafter_device="cuda:1",
        executor="eager",
        store=["text"],
        context="documents",
        knowledge_transfer=2.0,
        model_kwargs={"dtype": "float32"},
        chat_template_kwargs={"enable_thinking": False},
        retrieval=retrieval,
        num_draft_tokens=4,
        prefix_cache_bytes=5,
        prefix_cache_dir="kept",
        prefix_cache_dir_bytes=6,
        namespace="tenant",
    )

    assert llm._rasd.model_name == str(Path("models") / "m.gguf")
    expected = {
        "drafter": "org/small",
        "drafter_device": "cuda:1",
        "executor": "eager",
        "store": ["text"],
        "context": "documents",
        "knowledge_transfer": 2.0,
        "deterministic": False,
        "model_kwargs": {"dtype": "float32"},
        "chat_template_kwargs": {"enable_thinking": False},
        "retrieval": retrieval,
        "speculation": SpeculationConfig(num_draft_tokens=4),
        "prefix_cache_bytes": 5,
        "prefix_cache_dir": "kept",
        "prefix_cache_dir_bytes": 6,
        "namespace": "tenant",
    }
    assert expected == llm._rasd.options


def test_the_signature_names_every_option():
    """An editor can show what the constructor takes."""
    names = set(inspect.signature(RASDLLM).parameters)

    assert {"model", "drafter", "store", "max_tokens", "knowledge_transfer", "seed"} <= names


# --- life cycle -----------------------------------------------------------------------------------


def test_construction_loads_nothing(llm):
    """Weights come with the first call or with ``load()``."""
    before = llm._rasd.loads
    assert llm.load() is llm

    assert (0, 1) == (before, llm._rasd.loads)


def test_from_model_takes_loaded_objects():
    """Objects that are loaded already are used as they are."""
    model, tokenizer, drafter = object(), object(), object()
    llm = RASDLLM.from_model(model, tokenizer, drafter, max_tokens=4)

    assert (model, tokenizer, drafter) == llm._rasd.loaded_objects
    assert llm.max_tokens == 4


def test_warm_takes_texts_and_nodes(llm):
    """Documents are read as prompts show them: with the metadata that LLMs see."""
    told = []
    node = TextNode(text="body", metadata={"file_name": "a.txt"})
    assert llm.warm(["plain", node], lambda *figures: told.append(figures)) is llm

    assert ["plain", "file_name: a.txt\n\nbody"] == llm._rasd.warmed
    assert [(2, 2)] == told


def test_leaving_the_context_closes(llm):
    """The LLM is a context manager."""
    with llm as same:
        assert same is llm

    assert llm._rasd.is_closed


def test_metadata_tells_the_models_true_measures(llm):
    """The window comes from the model, the output from max_tokens."""
    metadata = llm.metadata

    assert (8192, 32) == (metadata.context_window, metadata.num_output)
    assert metadata.model_name == "some/model"
    assert (True, True) == (metadata.is_chat_model, metadata.is_function_calling_model)


def test_serialised_settings_hold_no_objects_and_no_secrets():
    """What is written down makes an equal LLM again, without store, drafter object and credentials."""
    assert RASDLLM("m", drafter=Path("small")).to_dict()["drafter"] == "small"
    llm = RASDLLM(
        "m",
        drafter=SuffixDrafter(),
        store=["private text"],
        temperature=0.3,
        stop=["#"],
        model_kwargs={"token": "hf_secret"},
        retrieval=RetrievalConfig(k=3),
    )
    data = json.loads(llm.to_json())
    again = RASDLLM.from_dict({**data, "drafter": "auto"})

    written = json.dumps(data) + repr(llm) + str(llm.to_payload())
    assert ("RASDLLM", "<drafter object: SuffixDrafter>") == (data["class_name"], data["drafter"])
    assert "secret" not in written
    assert "private" not in written
    assert (0.3, ["#"], 3) == (again.temperature, again.stop, again.retrieval.k)


def test_a_copy_shares_the_engine(llm):
    """Weights are not copied along with options."""
    assert copy.deepcopy(llm)._rasd is llm._rasd


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_pickled_llm_loads_for_itself(llm):
    """A copy in another process has the settings and an engine of its own."""
    again = pickle.loads(pickle.dumps(llm))

    assert again.max_tokens == 32
    assert TEXT == again.complete("Who?").text


def test_an_llm_can_be_collected(llm):
    """The process-wide observer keeps no LLM alive."""
    other = RASDLLM("m")
    engine = weakref.ref(other._rasd)
    del other
    gc.collect()

    assert engine() is None


def test_construction_imports_no_engine():
    """A process that only makes an LLM pays for LlamaIndex, not for torch."""
    code = (
        "import sys; from rasd_integrations.llama_index import RASDLLM; RASDLLM('some/model'); "
        "print(sorted({'torch', 'transformers', 'llguidance'} & set(sys.modules)))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]

    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "[]\n"


async def test_loading_ahead(llm):
    """Weights can be loaded without holding up the event loop."""
    assert await llm.aload() is llm

    assert llm._rasd.loads == 1


def test_a_missing_framework_names_the_extra(monkeypatch):
    """Without LlamaIndex the import says what to install."""
    for name in [n for n in sys.modules if n.startswith("rasd_integrations.llama_index")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "llama_index.core", None)

    with pytest.raises(MissingDependencyError, match=r"rasd-integrations\[llama-index\]"):
        importlib.import_module("rasd_integrations.llama_index")


# --- the framework's own tools --------------------------------------------------------------------


def test_token_counting_reads_the_models_own_counts(llm):
    """LlamaIndex's token counter takes the usage, also of a stream, and counts nothing itself."""
    counter = TokenCountingHandler(tokenizer=lambda _: pytest.fail("counted by itself"))
    llm.callback_manager = CallbackManager([counter])
    llm.chat(USER)
    list(llm.stream_complete("Who built it?"))

    assert (24, 14) == (counter.prompt_llm_token_count, counter.completion_llm_token_count)


def test_configure_settings_sets_the_models_measures(llm, monkeypatch):
    """The global helper counts with the model's tokenizer and leaves room for its template."""
    monkeypatch.setattr("llama_index.core.global_tokenizer", None)
    for name in ("_llm", "_prompt_helper"):
        monkeypatch.setattr(Settings, name, None)
    configure_settings(llm)

    assert Settings.llm is llm
    assert Settings.tokenizer("Who built it?") == llm.encode("Who built it?")
    assert (8192 - 13, 32) == (Settings.context_window, Settings.num_output)
