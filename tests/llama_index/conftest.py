"""What the tests of LlamaIndex pipelines share; files that need another ``llm`` define their own."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    *(f"contract_{name}" for name in ("setup", "endpoints", "tools", "rag", "agents", "running"))
)


@pytest.fixture(params=["memory", "chroma", "faiss"])
def any_index(request, tmp_path):
    """Return the nodes in each of the stores."""
    from cases_llama_index import make_index

    return make_index(request.param, tmp_path)


@pytest.fixture
def index(tmp_path):
    """Return the nodes in LlamaIndex's own store."""
    from cases_llama_index import make_index

    return make_index("memory", tmp_path)


@pytest.fixture
def fake_engine(monkeypatch):
    """Put the recording engine in RASD's place."""
    from fakes_llama_index import FakeRASD
    from fakes_rasd import ENGINE

    monkeypatch.setattr(ENGINE, FakeRASD)


@pytest.fixture
def llm(fake_engine):
    """Return an LLM over the recording engine; its process saw no retrieval yet."""
    from rasd_integrations.llama_index import RASDLLM

    llm = RASDLLM("some/model", max_tokens=32)
    llm._trace._retrievals.clear()  # of the tests before
    return llm
