"""What importing the LangChain edge costs: no torch, and hardly more time than LangChain's own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "tokenizers", "llguidance", "chromadb", "faiss")

SCRIPT = """
import json, sys, time
start = time.process_time()
from langchain_core.language_models import BaseChatModel, BaseLLM
theirs = time.process_time()
from rasd_integrations.langchain import RASDLLM, ChatRASD
ours = time.process_time()
from langchain_core.documents import Document
from pydantic import BaseModel
class Joke(BaseModel):
    "A joke."
    setup: str
llm = ChatRASD(model="org/one", store=[Document("x")], retrieval={"k": 3}, stop=["x"])
llm.bind_tools([Joke], tool_choice="any")
llm.with_structured_output(Joke)
RASDLLM(model="org/one")
heavy = [name for name in json.loads(sys.argv[1]) if name in sys.modules]
print(json.dumps({"seconds": ours - theirs, "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def runs():
    """Return what some fresh interpreters measured."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(HEAVY)]
    return [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(4)
    ]


@pytest.mark.slow
def test_torch_waits_until_a_model_is_loaded(runs):
    """Neither the import nor building models, tools and chains brings in what only decoding needs."""
    assert [[]] * 4 == [run["heavy"] for run in runs]


def test_the_import_is_quick(runs):
    """The goal is 0.3 s; on a busy machine the processor's time of the fastest of some runs stays near it."""
    assert min(run["seconds"] for run in runs) < 0.6
