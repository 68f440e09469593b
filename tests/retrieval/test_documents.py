"""Which chunks make a document, and how they join to its text."""

from __future__ import annotations

import pytest
from fakes_stores import TEXTS, cut
from hypothesis import given
from hypothesis import strategies as st
from langchain_text_splitters import RecursiveCharacterTextSplitter

from rasd_integrations.retrieval import join_chunks
from rasd_integrations.retrieval.documents import document_of, reading_order
from rasd_integrations.types import Chunk


def chunks_of(name: str, **sizes: int) -> list[Chunk]:
    return [Chunk(d.page_content, metadata=d.metadata) for d in cut(name, TEXTS[name], **sizes)]


def fetch_from(chunks: list[Chunk]):
    return lambda key, value: [c for c in chunks if c.metadata.get(key) == value]


def test_chunks_are_ordered_by_their_start_whatever_the_store_says():
    """A store that hands chunks back in rank order still gives a document in reading order."""
    chunks = chunks_of("tides.txt")
    assert reading_order(chunks[::-1]) == chunks


def test_pages_come_before_places():
    """A place counts from the start of its page."""
    first = Chunk("end of page two", metadata={"page": 2, "start_index": 500})
    second = Chunk("head of page ten", metadata={"page": 10, "start_index": 0})
    assert reading_order([second, first]) == [first, second]


def test_page_labels_are_numbers_in_strings():
    """LlamaIndex's page labels are strings; ten stands behind two."""
    two, ten = (Chunk(f"page {n}", metadata={"page_label": n}) for n in ("2", "10"))
    assert reading_order([ten, two]) == [two, ten]


def test_roman_page_labels_leave_the_order_of_the_store():
    """Front matter in Roman numbers is not sorted behind the Arabic pages."""
    chunks = [Chunk(f"page {n}", metadata={"page_label": n}) for n in ("iv", "1", "2")]
    assert reading_order(chunks) == chunks


def test_a_chunk_that_its_splitter_could_not_find_stays_behind_its_neighbour():
    """LangChain writes start_index -1 where it could not find a chunk."""
    a, b, c = (Chunk(t, metadata={"start_index": i}) for t, i in (("a", 0), ("b", -1), ("c", 50)))
    assert reading_order([a, b, c]) == [a, b, c]


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "iv", [1, 2], {"a": 1}, None, -1, True]
)
def test_odd_places_and_pages_leave_the_order_of_the_store(value):
    """Metadata are data: lists, NaN from tables and words stand where numbers were meant."""
    chunks = [
        Chunk(t, metadata={"source": "s", "page": value, "start_index": value})
        for t in ("b" * 20, "a" * 20)
    ]
    assert reading_order(chunks) == chunks
    assert join_chunks(chunks) == "b" * 20 + "\n\n" + "a" * 20


def test_a_chunk_stored_twice_stands_once():
    """A document indexed twice without changes is one document."""
    chunks = chunks_of("tides.txt")
    assert reading_order(chunks + chunks) == chunks


def test_a_document_is_found_by_its_source():
    """All chunks with the chunk's source, and no others."""
    tides, bees = chunks_of("tides.txt"), chunks_of("bees.txt")
    assert document_of(bees[2], fetch_from(tides + bees)) == bees


def test_two_versions_of_one_file_are_no_document():
    """A file added again after an edit, without deletion: its text cannot be known."""
    old = chunks_of("tides.txt")
    new = [Chunk(c.text.upper(), metadata=c.metadata) for c in old]
    assert document_of(old[0], fetch_from(old + new)) == []


def test_a_source_of_many_documents_is_narrowed_by_the_next_key():
    """A source like "wiki" names a collection; the ids below it name its documents."""
    wiki = [
        Chunk(
            c.text,
            metadata={"source": "wiki", "doc_id": name, "start_index": c.metadata["start_index"]},
        )
        for name in TEXTS
        for c in chunks_of(name)
    ]
    assert document_of(wiki[0], fetch_from(wiki)) == [
        c for c in wiki if c.metadata["doc_id"] == "tides.txt"
    ]


def test_the_pages_of_a_file_are_one_document():
    """LlamaIndex loads each page with an id of its own; the file is what a reader means."""
    pages = [
        Chunk(
            f"page {i}",
            metadata={"file_path": "a.pdf", "ref_doc_id": f"p{i}", "page_label": str(i)},
        )
        for i in range(3)
    ]
    assert document_of(pages[1], fetch_from(pages)) == pages


@pytest.mark.parametrize(
    "metadata", [{}, {"source": None}, {"source": ""}, {"ref_doc_id": "None"}, {"source": ["a"]}]
)
def test_a_chunk_that_names_no_document_has_none(metadata):
    """Chunks without a source do not make one document together."""
    chunks = [Chunk("a", metadata=metadata), Chunk("b", metadata=metadata)]
    assert document_of(chunks[0], fetch_from(chunks)) == []


def test_a_group_beyond_any_document_is_refused(monkeypatch):
    """A source that holds most of a store is a collection, not a document."""
    monkeypatch.setattr("rasd_integrations.retrieval.documents.MAX_DOCUMENT_CHUNKS", 3)
    chunks = chunks_of("tides.txt")
    assert len(chunks) > 3
    assert document_of(chunks[0], fetch_from(chunks)) == []


@pytest.mark.parametrize("name", TEXTS)
def test_join_gives_back_the_text_by_places(name):
    """Chunks that overlap by what their places say join to the very text."""
    assert join_chunks(chunks_of(name)) == TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
def test_join_gives_back_the_text_without_places(name):
    """Without places the overlap is what two chunks share exactly."""
    bare = [Chunk(c.text) for c in chunks_of(name)]
    assert join_chunks(bare) == TEXTS[name]


def test_join_does_not_cut_a_chance_agreement():
    """A few shared characters are no overlap."""
    assert (
        join_chunks([Chunk("It rains in the "), Chunk("the house is dry.")])
        == "It rains in the \n\nthe house is dry."
    )


def test_join_does_not_trust_a_place_that_the_text_denies():
    """Places of a text that was changed after splitting do not eat characters."""
    parts = [
        Chunk("alpha beta", metadata={"start_index": 0}),
        Chunk("gamma delta", metadata={"start_index": 5}),
    ]
    assert join_chunks(parts) == "alpha beta\n\ngamma delta"


def test_join_leaves_out_a_chunk_inside_another():
    """A chunk that lies inside the one before it (two splitters, one store) adds nothing."""
    outer = Chunk("alpha beta gamma", metadata={"start_index": 0})
    inner = Chunk("beta", metadata={"start_index": 6})
    tail = Chunk("gamma delta", metadata={"start_index": 11})
    assert join_chunks([outer, inner, tail]) == "alpha beta gamma delta"


def test_join_parts_pages():
    """Places count within a page, so a new page is a new paragraph."""
    parts = [
        Chunk("one", metadata={"page": 0, "start_index": 0}),
        Chunk("two", metadata={"page": 1, "start_index": 3}),
    ]
    assert join_chunks(parts) == "one\n\ntwo"


def test_join_of_nothing_is_empty():
    """No chunks, no text."""
    assert join_chunks([]) == ""


def test_join_of_one_repeated_character_is_fast():
    """The search for an overlap stays cheap on the worst text."""
    assert join_chunks([Chunk("a" * 200_000), Chunk("a" * 199_999 + "b")]).endswith("ab")


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400),
    size=st.integers(5, 60),
    share=st.floats(0, 0.8),
)
def test_join_undoes_any_cut(text, size, share):
    """Whatever the text and the overlap, places give it back."""
    pieces = cut("t", text, size, int(size * share))
    assert join_chunks([Chunk(d.page_content, metadata=d.metadata) for d in pieces]) == text


@pytest.mark.parametrize("overlap", [0, 30, 60])
def test_join_gives_back_what_langchains_splitter_cut(overlap):
    """The words of a document survive a real splitter, which strips white space, in order and once."""
    text = "\n\n".join(TEXTS.values()) * 2
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=150, chunk_overlap=overlap, add_start_index=True
    )
    pieces = splitter.create_documents([text], [{"source": "t"}])
    joined = join_chunks([Chunk(d.page_content, metadata=d.metadata) for d in pieces])
    assert joined.split() == text.split()
