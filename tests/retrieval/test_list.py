"""Lists, functions and several sources as one."""

from __future__ import annotations

import pytest
from fakes_stores import TEXTS, WordEmbeddings, documents, embed_texts

from rasd_integrations.errors import RetrievalError
from rasd_integrations.retrieval import JoinedSource, as_chunk_source, join_chunks
from rasd_integrations.retrieval.items import metadata_predicate
from rasd_integrations.types import Chunk

SENTENCES = [s + "." for text in TEXTS.values() for s in text.rstrip(".").split(". ")]


@pytest.mark.parametrize("embed", [None, embed_texts, WordEmbeddings()])
def test_a_list_is_ranked_by_the_question(embed):
    """By words, by a function or by an embedding object, the sentence that answers comes first."""
    found = as_chunk_source(SENTENCES, embed=embed).search("Who carved the slate itself?", 3)
    assert found[0].text == "The slate itself was carved by a widow named Brenna."
    assert [c.rank for c in found] == list(range(len(found)))
    assert len(found) <= 3


def test_words_that_stand_everywhere_weigh_little():
    """BM25: a rare word decides over common ones."""
    texts = ["the the the ship of the sea", "the heather", "the sea and the ship"]
    assert as_chunk_source(texts).search("the heather", 1)[0].text == "the heather"


def test_texts_that_share_no_word_are_not_found():
    """A lexical search that knows nothing says nothing."""
    assert as_chunk_source(SENTENCES).search("quantum chromodynamics", 5) == []


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("蜂蜜の味", "蜂蜜は煙の味がする"),
        ("СОЛЬ", "море и соль"),
        ("straße", "Die STRASSE am Hafen"),
    ],
)
def test_words_are_matched_in_any_script(query, expected):
    """Case is folded, and scripts without spaces are matched by character."""
    texts = ["潮の表は石に", "蜂蜜は煙の味がする", "море и соль", "Die STRASSE am Hafen", "nothing"]
    assert as_chunk_source(texts).search(query, 1)[0].text == expected


def test_an_empty_list_finds_nothing():
    """No texts, no chunks, by words and by vectors."""
    assert as_chunk_source([]).search("q", 3) == []
    assert as_chunk_source([], embed=embed_texts).search("q", 3) == []


def test_a_list_that_changes_is_indexed_again():
    """Texts added, replaced and removed between two questions are seen."""
    texts = ["a stone", "a river"]
    source = as_chunk_source(texts)
    assert source.search("copper", 1) == []
    before = source.fingerprint()
    texts[0] = "a copper coin"
    assert source.search("copper", 1)[0].text == "a copper coin"
    del texts[0]
    assert source.search("copper", 1) == []
    assert source.fingerprint() != before


def test_a_list_of_documents_knows_whole_documents():
    """Documents in a list bring their sources; the chunk need not."""
    source = as_chunk_source(documents())
    chunk = source.search("honey heather smoke", 1)[0]
    assert join_chunks(source.document(chunk)) == TEXTS["bees.txt"]
    assert join_chunks(source.document(Chunk(chunk.text))) == TEXTS["bees.txt"]


def test_bare_texts_belong_to_no_document():
    """Strings in a list may be anything, so nothing is joined."""
    source = as_chunk_source(SENTENCES)
    assert source.document(source.search("honey", 1)[0]) == []


def test_a_text_in_two_documents_does_not_tell_its_document():
    """A licence header is no way to find the file that was meant."""
    held = [Chunk("licence", metadata={"source": "a"}), Chunk("licence", metadata={"source": "b"})]
    assert as_chunk_source(held).document(Chunk("licence")) == []


@pytest.mark.parametrize(
    "filter",
    [
        {"source": "bees.txt"},
        {"source": ["bees.txt"]},
        lambda metadata: metadata["source"] == "bees.txt",
    ],
    ids=["equal", "one of", "function"],
)
def test_a_list_obeys_a_filter(filter):
    """By equal values, by lists of values and by a function, for searches and documents."""
    source = as_chunk_source(documents())
    found = source.search("the slate honey tide", 20, filter=filter)
    assert {c.metadata["source"] for c in found} == {"bees.txt"}
    assert source.document(source.search("slate", 1)[0], filter=filter) == []


@pytest.mark.parametrize(
    ("metadata", "passes"),
    [({"tenant": 1, "year": 3}, True), ({"tenant": 1, "year": 4}, False), ({"tenant": 1}, False)],
)
def test_a_filter_of_two_keys_needs_both(metadata, passes):
    """A tenant's chunk of another year does not pass."""
    allows = metadata_predicate({"tenant": 1, "year": [2, 3]})
    assert allows(Chunk("x", metadata=metadata)) == passes


@pytest.mark.parametrize("filter", [{"$and": []}, {"source": {"$in": ["a"]}}, "source == 'a'", 7])
def test_a_filter_that_cannot_be_read_lets_nothing_pass(filter):
    """A filter is a promise to someone: what is not understood is refused."""
    with pytest.raises(RetrievalError, match="filter"):
        as_chunk_source(documents()).search("slate", 3, filter=filter)


def test_an_embedding_of_the_wrong_shape_is_named():
    """A function of one text instead of a list is the common mistake."""
    source = as_chunk_source(SENTENCES, embed=lambda text: [0.0, 1.0])
    with pytest.raises(RetrievalError, match="list of texts"):
        source.search("q", 3)


def test_a_function_is_a_store():
    """Strings, chunks, documents and scored documents may be returned."""
    found = as_chunk_source(
        lambda query, k: ["a", Chunk("b", id="2"), documents()[0], (documents()[1], 0.5)]
    ).search("q", 4)
    assert [c.text for c in found] == [
        "a",
        "b",
        documents()[0].page_content,
        documents()[1].page_content,
    ]
    assert [c.rank for c in found] == [0, 1, 2, 3]


def test_a_function_is_handed_the_filter_or_not_called_under_one():
    """Nothing passes a filter that the function cannot apply."""
    seen = []
    takes = as_chunk_source(lambda query, k, filter=None: seen.append(filter) or [])
    takes.search("q", 1, filter={"tenant": 1})
    assert seen == [{"tenant": 1}]
    with pytest.raises(RetrievalError, match="filter"):
        as_chunk_source(lambda query, k: ["secret"]).search("q", 1, filter={"tenant": 1})


def test_a_functions_fingerprint_is_its_name():
    """The same function is the same store."""
    assert as_chunk_source(embed_texts).fingerprint() == "function-fakes_stores.embed_texts"


def test_joined_sources_take_turns():
    """Each source's best first, every text once; documents come from the source that knows them."""
    named = documents()
    joined = JoinedSource(
        [as_chunk_source(lambda q, k: ["a1", "b1", "a2"]), as_chunk_source(named)]
    )
    best = as_chunk_source(named).search("slate", 1)[0]
    found = joined.search("slate", 4)
    assert [c.text for c in found[:3]] == ["a1", best.text, "b1"]
    assert [c.rank for c in found] == [0, 1, 2, 3]
    assert joined.document(best) == as_chunk_source(named).document(best)
    twice = JoinedSource([as_chunk_source(lambda q, k: ["a", "b"])] * 2)
    assert [c.text for c in twice.search("q", 9)] == ["a", "b"]
    assert len(twice.fingerprint().split("+")) == 2
