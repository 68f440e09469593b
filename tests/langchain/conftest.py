"""What the LangChain tests share: the engines that stand in for RASD, and a chain's parts."""

from __future__ import annotations

import pytest
from cases_langchain import STORES, memory_store, model
from fakes_langchain import FakeRASD, RecordingRASD
from fakes_rasd import ENGINE

from rasd_integrations.langchain import ChatRASD
from rasd_integrations.langchain.capture import _recent_roots


@pytest.fixture
def fake_engine(monkeypatch):
    """Put the engine that says what it is told in RASD's place."""
    monkeypatch.setattr(ENGINE, FakeRASD)


@pytest.fixture
def recording_engine(monkeypatch):
    """Put the real engine that also records in RASD's place."""
    monkeypatch.setattr(ENGINE, RecordingRASD)
    _recent_roots.set(())  # what other tests retrieved in this context


@pytest.fixture
def llm(fake_engine):
    """Return a chat model over the fake engine."""
    return ChatRASD(model="org/one")


@pytest.fixture
def tiny_llm(recording_engine):
    """Return a chat model round the tiny one."""
    return model(ChatRASD)


@pytest.fixture
def retriever():
    """Return the facts in memory, two a question."""
    return memory_store().as_retriever(search_kwargs={"k": 2})


@pytest.fixture(params=STORES)
def store(request):
    """Return the facts in each of the stores."""
    return STORES[request.param]()
