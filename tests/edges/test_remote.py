"""What all three framework models do with a model behind HTTP: options, secrets, the same answers."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
from fake_server import VLLM, Says, fake_server
from served import engines_over, served
from tiny import tiny_llama, tiny_tokenizer

from rasd_integrations.config import RetrievalConfig, SpeculationConfig
from rasd_integrations.edges.call_options import ENGINE_OPTIONS
from rasd_integrations.edges.engine import SERVER_OPTIONS, SETTINGS
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.server.settings import ServerSettings

KINDS = ("langchain.ChatRASD", "langchain.RASDLLM", "llama_index.RASDLLM")
URL = "http://127.0.0.1:9/v1"


def model_class(kind):
    """Return the class, once its framework is there."""
    room, name = kind.split(".")
    pytest.importorskip("langchain_core" if room == "langchain" else "llama_index.core")
    return getattr(__import__(f"rasd_integrations.{room}", fromlist=[name]), name)


@pytest.fixture(params=KINDS)
def cls(request):
    return model_class(request.param)


def ask(llm, text="Who?", **options):
    """Return what a model says."""
    said = (getattr(llm, "invoke", None) or llm.complete)(text, **options)
    return getattr(said, "text", said)


# --- what belongs where ---

LOCAL = {
    "drafter": "self", "drafter_device": "cpu", "executor": "eager", "weights": "int8", "store": ["a text"],
    "deterministic": True, "model_kwargs": {"dtype": "float32"}, "num_draft_tokens": 3,
    "retrieval": RetrievalConfig(k=3), "speculation": SpeculationConfig(max_draft_tokens=2),
    "prefix_cache_bytes": 0, "cache_dir": "folder", "prefix_disk_bytes": 1, "namespace": "n", "memory": False,
    "mode": "route",
}  # fmt: skip
TRAVEL = {
    "model": "one",
    "context": "documents",
    "knowledge_transfer": "rapid:10",
    "chat_template_kwargs": {"x": 1},
}


def test_every_option_of_the_engine_has_its_place():
    """A new one is either refused beside a server or travels."""
    assert {*ENGINE_OPTIONS} == {*LOCAL, *TRAVEL, *SERVER_OPTIONS, "engines"} - {"engines"}


@pytest.mark.parametrize("name", LOCAL)
def test_an_option_of_the_loaded_model_is_refused_beside_a_server(cls, name):
    """By name, with where to set it; its value may be a secret."""
    with pytest.raises(
        ConfigurationError, match=f"^{name} is set beside base_url.*rasd serve"
    ) as caught:
        cls(base_url=URL, **{name: LOCAL[name]})

    assert "a text" not in str(caught.value)
    assert (f"--{name.replace('_', '-')} " in str(caught.value)) is (name in SETTINGS)


def test_flags_that_are_named_are_flags_of_the_server():
    """What an error tells to start the server with can be given to it."""
    assert {*SETTINGS} == {*LOCAL} & {*ServerSettings.model_fields}


def test_what_travels_is_taken(cls):
    """And defaults that are spelt out, as copies of all fields do."""
    llm = cls(base_url=URL, drafter="auto", memory=True, retrieval={}, store=None, **TRAVEL)

    assert {**TRAVEL, "base_url": URL} == llm._rasd.identity


def test_a_loaded_model_has_no_server(cls):
    """It would be asked for nothing."""
    with pytest.raises(ConfigurationError, match="is loaded here"):
        cls.from_model("M", "T", base_url=URL)


def test_options_of_a_server_need_one(cls):
    """LangChain's classes warn of the three that its code passes to any model; this is none of them."""
    with pytest.raises(
        ConfigurationError, match="client_kwargs is an option of a server, but no base_url"
    ):
        cls("org/one", client_kwargs={"default_headers": {}})


def test_llama_index_refuses_a_servers_options_without_one():
    """Nobody passes them there without meaning it."""
    with pytest.raises(ConfigurationError, match="timeout is an option of a server"):
        model_class(KINDS[2])("org/one", timeout=5)


@pytest.mark.parametrize(
    ("name", "meant"), [("api_base", "'base_url'"), ("organization", "client_kwargs=")]
)
def test_other_integrations_names_are_known(cls, name, meant):
    """The error names the option that was meant."""
    with pytest.raises(ConfigurationError, match=meant):
        cls(base_url=URL, **{name: "x"})


@pytest.mark.parametrize(
    "call", ["tokenizer", "warm", "forget", "clear_cache", "attach", "explain"]
)
def test_what_does_not_travel_says_so(cls, call):
    """Each with what to do instead; no server is asked."""
    llm = cls(base_url=URL)
    given = {"warm": (["a text"],), "attach": (_store(cls),), "explain": ("Who?",)}
    with pytest.raises(ConfigurationError, match=f"{call} is not possible for a model at {URL}: "):
        getattr(llm, call)(*given.get(call, ())) if call != "tokenizer" else llm.tokenizer


def _store(cls):
    if cls.__module__.startswith("rasd_integrations.langchain"):
        from cases_langchain import memory_store

        return memory_store()
    from contract_setup import index_of
    from llama_index.core.schema import TextNode

    return index_of(TextNode(text="A fact."))


# --- secrets and copies ---

SECRETS = {"api_key": "sk-secret", "client_kwargs": {"default_headers": {"x-key": "secret-too"}}}


def test_secrets_are_shown_nowhere(cls):
    """No print, dump, pickle, trace or cache key holds a key or a header."""
    llm = cls(base_url=URL, **SECRETS)
    shown = [
        repr(llm),
        str(llm),
        str(llm.model_dump()),
        llm.model_dump_json(),
        str(llm._rasd.identity),
    ]
    shown.append(pickle.dumps(llm).decode("latin-1"))
    if hasattr(llm, "_get_ls_params"):
        from langchain_core.load import dumps

        shown += [
            dumps(llm),
            str(llm._get_ls_params()),
            str(llm._identifying_params),
            str(llm.asdict()),
        ]
    else:
        shown += [llm.to_json(), str(llm.to_dict())]

    assert [False] * len(shown) == ["secret" in text for text in shown]
    with pytest.raises(ConfigurationError) as caught:
        cls(base_url=URL, api_key=["secret"])
    assert "secret" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_copies_and_pickles_ask_the_same_server(cls, monkeypatch):
    """A copy shares the connections and the key; a pickle has its own, and the environment's."""
    monkeypatch.setenv("OPENAI_API_KEY", "env")
    with fake_server(cards=[VLLM]) as server:
        server.says = [
            Says(
                [
                    {
                        "choices": [
                            {
                                "text": "Four.",
                                "delta": {"content": "Four."},
                                "finish_reason": "stop",
                            }
                        ]
                    }
                ]
            )
        ]
        llm = cls(base_url=server.base_url, api_key="mine", temperature=0.5)
        said = [
            ask(one)
            for one in (llm, copy.copy(llm), copy.deepcopy(llm), pickle.loads(pickle.dumps(llm)))
        ]
        llm.close()

    assert ["Four."] * 4 == said
    keys = [
        h["authorization"]
        for h, path in zip(server.headers, server.paths, strict=True)
        if "completions" in path
    ]
    assert ["Bearer mine"] * 3 + ["Bearer env"] == keys
    assert [0.5] * 4 == [body["temperature"] for body in server.bodies]


ALONE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "transformers", "tokenizers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
from importlib import import_module
cls = getattr(import_module(sys.argv[1].rpartition(".")[0]), sys.argv[1].rpartition(".")[2])
llm = cls(base_url=sys.argv[2])
said = (getattr(llm, "invoke", None) or llm.complete)("Who?")
print(getattr(said, "text", said), llm._rasd.encode("a"))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_needs_no_torch(kind):
    """A process that only asks has the frameworks and the openai package, no more."""
    model_class(kind)
    both = Says(
        [{"choices": [{"text": "Four.", "delta": {"content": "Four."}, "finish_reason": "stop"}]}]
    )
    with fake_server(both, Says(body={"tokens": [5]})) as server:
        command = [sys.executable, "-c", ALONE, f"rasd_integrations.{kind}", server.base_url]
        done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ("Four. [5]\n", 0) == (done.stdout, done.returncode), done.stderr


# --- the same answers ---


@pytest.fixture(scope="module")
def tiny():
    """Serve a random model, which says something else for every option; return it and its address."""
    parts = tiny_llama(), tiny_tokenizer()
    with served(engines_over(*parts), name="tiny", streams=4) as server:
        yield parts, server.base_url


SAMPLED = {"temperature": 1.5, "seed": 3}
OPTIONS = [
    {}, SAMPLED, {"temperature": 0.7, "seed": 3}, {**SAMPLED, "seed": 4}, {**SAMPLED, "top_p": 0.5}, {**SAMPLED, "top_k": 3},
    {**SAMPLED, "min_p": 0.3}, {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}, {"stop": ["#"]},
    {"max_tokens": 3}, {"use_generation_config": False}, {"drafter": None}, {"on_cut": "raise"},
    {"response_format": {"type": "json_object"}},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=json.dumps)
def test_answers_are_those_of_the_loaded_model(cls, tiny, options):
    """Every option of an answer travels: with a seed, the text is the same."""
    parts, url = tiny
    with cls(base_url=url, max_tokens=24) as there, cls.from_model(*parts, max_tokens=24) as here:
        text = ask(there, **options)
        assert ask(here, **options) == text
        assert text


def test_the_options_of_the_table_matter(tiny):
    """Else an option that is lost on the way would not be seen."""
    parts, _ = tiny
    with model_class(KINDS[0]).from_model(*parts, max_tokens=24) as here:
        plain, sampled = ask(here), ask(here, **SAMPLED)
        for options in OPTIONS[2:11]:
            assert (sampled if "seed" in options else plain) != ask(here, **options), options


def test_a_fields_value_travels_as_a_calls_does(cls, tiny):
    """Options of the model itself are those of each call."""
    _, url = tiny
    with cls(base_url=url, **SAMPLED, max_tokens=12) as fields, cls(base_url=url) as call:
        assert ask(fields) == ask(call, **SAMPLED, max_tokens=12)


def test_log_probabilities_are_those_of_the_loaded_model(tiny):
    """With their alternatives and bytes, over the server's texts."""
    parts, url = tiny
    cls, options = model_class(KINDS[0]), {"logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    with cls(base_url=url, **options) as there, cls.from_model(*parts, **options) as here:
        found = [
            llm.invoke("Who?").response_metadata["logprobs"]["content"] for llm in (there, here)
        ]

    assert 6 == len(found[0])
    for one, other in zip(*found, strict=True):
        assert (other["token"], other["bytes"], 2) == (
            one["token"],
            one["bytes"],
            len(one["top_logprobs"]),
        )
        assert one["logprob"] == pytest.approx(other["logprob"], abs=1e-3)
