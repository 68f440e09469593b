"""A raw faiss index with its texts."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
from fakes_stores import DIMENSION, TEXTS, documents, embed_text, embed_texts

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval import GuardedSource, as_chunk_source, join_chunks

DOCUMENTS = documents()
CONTENT = [d.page_content for d in DOCUMENTS]


def vectors(texts):
    return np.array(embed_texts(texts), dtype=np.float32)


def filled(index):
    index.add(vectors(CONTENT))
    return index


@pytest.mark.parametrize("index", [faiss.IndexFlatL2, faiss.IndexFlatIP])
def test_the_nearest_text_comes_first_whatever_the_metric(index):
    """Distances and inner products order opposite ways; faiss's own order is used."""
    source = as_chunk_source(filled(index(DIMENSION)), texts=CONTENT, embed=embed_texts)
    found = source.search(CONTENT[5], 3)
    assert found[0].text == CONTENT[5]
    assert [c.rank for c in found] == [0, 1, 2]


def test_more_than_there_is_gives_what_there_is():
    """Faiss fills up with -1; those are no texts."""
    source = as_chunk_source(filled(faiss.IndexFlatIP(DIMENSION)), texts=CONTENT, embed=embed_texts)
    assert len(source.search("slate", 500)) == len(CONTENT)


def test_documents_as_texts_give_whole_documents():
    """With metadata beside the texts, the document is known."""
    source = as_chunk_source(
        filled(faiss.IndexFlatIP(DIMENSION)), texts=DOCUMENTS, embed=embed_texts
    )
    chunk = source.search("honey heather smoke", 1)[0]
    assert join_chunks(source.document(chunk)) == TEXTS["bees.txt"]


def test_an_id_map_takes_a_mapping_and_forgets_what_was_removed():
    """Ids of their own come with a mapping; a text that is gone is passed over."""
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(DIMENSION))
    texts = {1000 + i: text for i, text in enumerate(CONTENT)}
    index.add_with_ids(vectors(CONTENT), np.array(list(texts)))
    source = as_chunk_source(index, texts=texts, embed=embed_texts)
    assert source.search(CONTENT[2], 1)[0].text == CONTENT[2]
    del texts[1002]
    assert CONTENT[2] not in [c.text for c in source.search(CONTENT[2], 50)]


def test_a_filter_looks_beyond_the_nearest():
    """Faiss knows no metadata, so all are ranked and then filtered."""
    source = as_chunk_source(
        filled(faiss.IndexFlatIP(DIMENSION)), texts=DOCUMENTS, embed=embed_texts
    )
    found = source.search("slate tide pilots", 2, filter={"source": "bees.txt"})
    assert [c.metadata["source"] for c in found] == ["bees.txt", "bees.txt"]


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"embed": embed_texts}, "texts"),
        ({"texts": CONTENT}, "embed"),
        ({"texts": CONTENT[:3], "embed": embed_texts}, "3 entries"),
    ],
)
def test_an_index_without_its_parts_is_refused(given, hint):
    """The error says what is missing."""
    with pytest.raises(RetrievalError, match=hint):
        as_chunk_source(filled(faiss.IndexFlatIP(DIMENSION)), **given)


def test_another_dimension_is_a_fault_with_both_numbers():
    """The wrong embedding is named instead of faiss's assertion."""
    source = GuardedSource(
        as_chunk_source(
            filled(faiss.IndexFlatIP(DIMENSION)),
            texts=CONTENT,
            embed=lambda t: [embed_text(x, 8) for x in t],
        ),
        5,
    )
    assert source.search("slate", 3) == []
    (fault,) = source.take_faults()
    assert "8 dimensions" in fault
    assert "256" in fault


def test_an_empty_index_finds_nothing_and_growth_changes_the_fingerprint():
    """Texts added to both are found by the next question."""
    index, texts = faiss.IndexFlatIP(DIMENSION), []
    source = as_chunk_source(index, texts=texts, embed=embed_texts)
    assert source.search("slate", 3) == []
    before = source.fingerprint()
    texts.append(CONTENT[0])
    index.add(vectors(CONTENT[:1]))
    assert [c.text for c in source.search("slate", 3)] == CONTENT[:1]
    assert source.fingerprint() != before
