"""The LlamaIndex LLM's options and life cycle, over an engine that only writes down what it was asked."""

from __future__ import annotations

import gc
import importlib
import json
import pickle
import subprocess
import sys
import weakref

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import TEXT, USER
from fakes_llama_index import shown
from llama_index.core import Settings
from llama_index.core.schema import TextNode

from rasd_integrations.config import RetrievalConfig, SamplingParams
from rasd_integrations.drafters import SuffixDrafter
from rasd_integrations.errors import ConfigurationError, MissingDependencyError
from rasd_integrations.llama_index import RASDLLM, configure_settings

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


def test_both_names_of_max_tokens():
    """LlamaIndex's own name is taken, but not both with different values."""
    assert RASDLLM("m", max_new_tokens=9).max_tokens == 9
    assert RASDLLM("m", max_tokens=9).max_new_tokens == 9
    with pytest.raises(ConfigurationError, match="max_tokens is 8 and max_new_tokens is 9"):
        RASDLLM("m", max_tokens=8, max_new_tokens=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_token": 1}, "Did you mean 'max_tokens'"),
        ({"tool": []}, "Unknown option 'tool'"),
        ({"stop": 5}, "wrong type"),
        ({"rasd": {"chunks": [1]}}, "is a int"),
    ],
)
async def test_every_endpoint_refuses(llm, options, message):
    """An option that a call cannot honour is refused, whole or streamed, sync or async."""
    with pytest.raises(ConfigurationError, match=message):
        llm.chat(USER, **options)
    with pytest.raises(ConfigurationError, match=message):
        llm.stream_complete("Who?", **options)
    with pytest.raises(ConfigurationError, match=message):
        await llm.achat(USER, **options)
    with pytest.raises(ConfigurationError, match=message):
        await llm.astream_complete("Who?", **options)


# --- life cycle -----------------------------------------------------------------------------------


def test_warm_takes_texts_and_nodes(llm):
    """Documents are read as prompts show them: with the metadata that LLMs see."""
    node = TextNode(text="body", metadata={"file_name": "a.txt"})
    assert llm.warm(["plain", node]) is llm

    assert ["plain", "file_name: a.txt\n\nbody"] == llm._rasd.warmed


def test_metadata_tells_the_models_true_measures(llm):
    """The window comes from the model, the output from max_tokens."""
    metadata = llm.metadata

    assert (8192, 32) == (metadata.context_window, metadata.num_output)
    assert metadata.model_name == "some/model"
    assert (True, True) == (metadata.is_chat_model, metadata.is_function_calling_model)


def test_serialised_settings_hold_no_objects_and_no_secrets():
    """What is written down makes an equal LLM again, without store, drafter object and credentials."""
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

    written = json.dumps(data) + repr(llm) + str(shown(llm))
    assert ("RASDLLM", "<drafter object: SuffixDrafter>") == (data["class_name"], data["drafter"])
    assert "secret" not in written
    assert "private" not in written
    assert (0.3, ["#"], 3) == (again.temperature, again.stop, again.retrieval.k)


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


def test_configure_settings_sets_the_models_measures(llm, monkeypatch):
    """The global helper counts with the model's tokenizer and leaves room for its template."""
    monkeypatch.setattr("llama_index.core.global_tokenizer", None)
    for name in ("_llm", "_prompt_helper"):
        monkeypatch.setattr(Settings, name, None)
    configure_settings(llm)

    assert Settings.llm is llm
    assert Settings.tokenizer("Who built it?") == llm.encode("Who built it?")
    assert (8192 - 13, 32) == (Settings.context_window, Settings.num_output)
