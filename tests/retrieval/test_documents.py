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


def at(text: str, **metadata: object) -> Chunk:
    return Chunk(text, metadata=metadata)


def test_chunks_are_ordered_by_their_start_and_repeats_dropped():
    """A store that returns chunks in rank order, or twice, still gives a document in reading order."""
    chunks = chunks_of("tides.txt")
    assert reading_order(chunks[::-1]) == reading_order(chunks + chunks) == chunks


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ([at("ten", page=10, start_index=0), at("two", page=2, start_index=500)], "two ten"),
        ([at("ten", page_label="10"), at("two", page_label="2")], "two ten"),
        ([at("ten", chunk_index=10), at("two", chunk_index=2)], "two ten"),
        ([at("a", start_index=0), at("b", start_index=-1), at("c", start_index=50)], "a b c"),
        ([at("iv", page_label="iv"), at("1", page_label="1"), at("2", page_label="2")], "iv 1 2"),
    ],
    ids=["offset in a page", "labels are strings", "ordinals", "not found by LangChain", "Roman"],
)
def test_pages_offsets_and_ordinals_are_compared_as_numbers(stored, expected):
    """Pages first; a chunk without an offset stays after its neighbour, and Roman pages where they are."""
    assert [c.text for c in reading_order(stored)] == expected.split()


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), "iv", [1, 2], {"a": 1}, None, -1, True]
)
def test_odd_places_and_pages_leave_the_order_of_the_store(value):
    """Metadata are data: lists, NaN from tables and words occur in place of numbers."""
    chunks = [at(t * 20, source="s", page=value, start_index=value) for t in "ba"]
    assert reading_order(chunks) == chunks
    assert join_chunks(chunks) == "b" * 20 + "\n\n" + "a" * 20


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


@pytest.mark.parametrize(
    ("chunks", "text"),
    [
        ([], ""),
        (
            [at("It rains in the "), at("the house is dry.")],
            "It rains in the \n\nthe house is dry.",
        ),
        (
            [at("alpha beta", start_index=0), at("gamma delta", start_index=5)],
            "alpha beta\n\ngamma delta",
        ),
        (
            [
                at("alpha beta gamma", start_index=0),
                at("beta", start_index=6),
                at("gamma delta", start_index=11),
            ],
            "alpha beta gamma delta",
        ),
        ([at("one", page=0, start_index=0), at("two", page=1, start_index=3)], "one\n\ntwo"),
    ],
    ids=["nothing", "a chance agreement", "a wrong offset", "one inside another", "pages"],
)
def test_join_cuts_overlaps_and_nothing_else(chunks, text):
    """A few shared characters are no overlap, offsets are compared with the text, and count within a page."""
    assert join_chunks(chunks) == text


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
