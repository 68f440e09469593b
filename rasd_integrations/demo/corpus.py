"""What the tour reads and asks: Markdown and text files, and two questions on each topic."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rasd_integrations.errors import ConfigurationError

SUFFIXES = (".md", ".txt")
GENERIC = (
    "What is this text about? Answer in three sentences.",
    "List the most important points of this text.",
)
OWN_TOPICS = {
    "glossary: what the words target, drafter, draft, block and chunk mean": (
        "What is a bonus token?",
        "What does lossless mean?",
    ),
    "context=documents: the target reads the whole documents of the chunks; access rights": (
        "What comes first when the documents exceed the window?",
        "What does this mode change?",
    ),
}


@dataclass(frozen=True, slots=True)
class Document:
    """A file as text; ``name`` is its path below the folder that was read."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Topic:
    """A search text and the questions that are asked, in turn, on the documents it finds."""

    search: str
    questions: tuple[str, ...]


def default_docs() -> Path | None:
    """Return this project's own docs, where the package lies in its repository."""
    docs = Path(__file__).parents[2] / "docs"
    return docs if (docs / "index.md").is_file() else None


def read_documents(path: str | Path | None, option: str = "--docs") -> list[Document]:
    """Read a file, or every ``.md`` and ``.txt`` file below a folder, in the order of their names.

    Args:
        path: The file or folder; ``None``: our own docs.
        option: What the command line calls it.

    Raises:
        ConfigurationError: The path is missing, or has no text to read.
    """
    root = Path(path) if path else default_docs()
    if root is None:
        msg = "This installation has no docs folder. Name a folder or a file with --docs PATH."
        raise ConfigurationError(msg)
    if not root.exists():
        msg = f"{option} is {str(root)!r}, but there is no such file or folder."
        raise ConfigurationError(msg)
    files = [root] if root.is_file() else sorted(f for f in root.rglob("*") if f.is_file())
    base = root.parent if root.is_file() else root
    documents = [
        Document(f.relative_to(base).as_posix(), text)
        for f in files
        if (root.is_file() or f.suffix.lower() in SUFFIXES)
        and (text := f.read_text(encoding="utf-8", errors="replace").strip())
    ]
    if not documents:
        msg = f"{option} is {str(root)!r}, but no {' or '.join(SUFFIXES)} file with text is in it."
        raise ConfigurationError(msg)
    return documents


def topics_for(path: str | Path | None, documents: Sequence[Document]) -> list[Topic]:
    """Return the tour's topics: written ones for our own docs, general ones for the user's."""
    if path is None:
        return [Topic(search, questions) for search, questions in OWN_TOPICS.items()]
    longest = sorted(documents, key=lambda d: len(d.text), reverse=True)[: len(OWN_TOPICS)]
    return [Topic(d.text[:400], GENERIC) for d in longest]


def fingerprint(documents: Sequence[Document], *settings: object) -> str:
    """Return twelve characters that change with the documents or with how they are cut."""
    digest = hashlib.sha256(repr(settings).encode())
    for document in documents:
        digest.update(f"\0{document.name}\0{document.text}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]
