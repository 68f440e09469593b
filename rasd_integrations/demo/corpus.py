"""The demo's documents (Markdown and text files) and its questions on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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


def read_documents(path: str | Path | None, option: str = "--docs") -> list[Document]:
    """Read a file, or every ``.md`` and ``.txt`` file below a folder, sorted by name.

    Args:
        path: The file or folder; ``None``: our own docs.
        option: The option's name on the command line.

    Raises:
        ConfigurationError: The path is missing, or has no text.
    """
    own = Path(__file__).parents[2] / "docs"
    root = Path(path) if path else own
    if root is own and not (own / "index.md").is_file():
        msg = "This installation has no docs folder. Name a folder or a file with --docs PATH."
        raise ConfigurationError(msg)
    if not root.exists():
        msg = f"{option} is {str(root)!r}, but there is no such file or folder."
        raise ConfigurationError(msg)
    base, files = root.parent, [root]
    if root.is_dir():
        found = (f for f in root.rglob("*") if f.is_file() and f.suffix.lower() in SUFFIXES)
        base, files = root, sorted(found)
    texts = ((f, f.read_text(encoding="utf-8", errors="replace").strip()) for f in files)
    documents = [Document(f.relative_to(base).as_posix(), text) for f, text in texts if text]
    if not documents:
        msg = f"{option} is {str(root)!r}, but no {' or '.join(SUFFIXES)} file with text is in it."
        raise ConfigurationError(msg)
    return documents


def topics_for(
    path: str | Path | None, documents: Sequence[Document]
) -> Mapping[str, tuple[str, ...]]:
    """Return questions by search text: written ones for our own docs, general ones for the user's."""
    if path is None:
        return OWN_TOPICS
    longest = sorted(documents, key=lambda d: len(d.text), reverse=True)[: len(OWN_TOPICS)]
    return {document.text[:400]: GENERIC for document in longest}


def fingerprint(documents: Sequence[Document], *settings: object) -> str:
    """Return twelve characters that identify the documents and the ``settings`` of cutting them."""
    digest = hashlib.sha256(repr(settings).encode())
    for document in documents:
        digest.update(f"\0{document.name}\0{document.text}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:12]
