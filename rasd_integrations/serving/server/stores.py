"""Opens the store that a server is given by its address or folder."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rasd_integrations.errors import MissingDependencyError, RetrievalError
from rasd_integrations.types import Chunk


def open_store(address: str) -> object:
    """Return a store for ``as_chunk_source``.

    Args:
        address: ``http://HOST:PORT#COLLECTION`` of a Chroma server, a folder of Chroma's (``FOLDER#COLLECTION``), or
            a folder in which LangChain or LlamaIndex saved a FAISS index: its texts are read, and searched by words.
            ``#COLLECTION`` may be left out where there is one only.

    Raises:
        RetrievalError: There is no such store, or it cannot be read.
        MissingDependencyError: The library of the store is not installed.
    """
    place, _, collection = address.partition("#")
    if urlsplit(place).scheme in ("http", "https"):
        return _chroma(_server(place), address, collection)
    folder = Path(place).expanduser()
    if (folder / "chroma.sqlite3").is_file():
        return _chroma(_chromadb().PersistentClient(str(folder)), address, collection)
    chunks: list[Chunk] = []
    if (folder / "docstore.json").is_file():
        chunks = list(_llama_index_chunks(folder / "docstore.json"))
    elif (folder / "index.pkl").is_file():
        chunks = list(_langchain_chunks(folder / "index.pkl"))
    else:
        msg = (
            f"The store {address!r} is no folder of Chroma (chroma.sqlite3), and none with a FAISS index of LangChain "
            f"(index.pkl) or LlamaIndex (docstore.json)."
        )
        raise RetrievalError(msg)
    if not chunks:
        msg = f"The store {address!r} holds no texts."
        raise RetrievalError(msg)
    return chunks


def _chromadb() -> Any:
    try:
        import chromadb
    except ImportError as err:
        module = "chromadb"
        raise MissingDependencyError(module, "chroma") from err
    return chromadb


def _server(place: str) -> Any:
    at = urlsplit(place)
    try:
        return _chromadb().HttpClient(
            host=at.hostname or "", port=at.port or 8000, ssl=at.scheme == "https"
        )
    except ValueError as err:  # Chroma's word for a server that does not answer
        msg = f"No Chroma server answers at {place!r}: {err}. Start one with: chroma run"
        raise RetrievalError(msg) from err


def _chroma(client: Any, address: str, name: str) -> object:
    names = sorted(str(getattr(c, "name", c)) for c in client.list_collections())
    if not name and len(names) == 1:
        (name,) = names
    if name not in names:
        asked = f"no collection {name!r}" if name else f"{len(names)} collections"
        msg = f"The store {address!r} has {asked}. Name one behind a #: {', '.join(names) or 'it is empty'}."
        raise RetrievalError(msg)
    return client.get_collection(name)


def _llama_index_chunks(path: Path) -> Iterator[Chunk]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["docstore/data"]
        for rank, (name, entry) in enumerate(entries.items()):
            data = entry["__data__"]
            node = json.loads(data) if isinstance(data, str) else data
            yield _chunk(name, node["text"], node.get("metadata"), rank)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise RetrievalError(_unreadable(path, err)) from err


def _langchain_chunks(path: Path) -> Iterator[Chunk]:
    try:
        with path.open("rb") as file:
            docstore, places = _Texts(file).load()
        for rank, name in enumerate(places.values()):
            found = docstore.state["_dict"][name].state
            fields = found.get("__dict__", found)  # pydantic 2 keeps the fields one level down
            yield _chunk(name, fields["page_content"], fields.get("metadata"), rank)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as err:
        raise RetrievalError(_unreadable(path, err)) from err


def _chunk(name: str, text: object, metadata: object, rank: int) -> Chunk:
    if not isinstance(text, str):
        msg = f"the text of {name!r} is a {type(text).__name__}"
        raise TypeError(msg)
    return Chunk(text, str(name), rank, metadata if isinstance(metadata, Mapping) else {})


class _State:
    """Takes the place of a pickled object, of which the state alone is read."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Texts(pickle.Unpickler):
    """Reads the texts of LangChain's FAISS folder; no class of the file is imported, and no code of it runs."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0].startswith("langchain") and name in (
            "Document",
            "InMemoryDocstore",
        ):
            return _State
        if (module, name) == ("builtins", "set"):
            return set
        msg = f"it asks for {module}.{name}, which a folder of texts does not need"
        raise pickle.UnpicklingError(msg)


def _unreadable(path: Path, err: Exception) -> str:
    return f"The texts of the FAISS index in {str(path)!r} cannot be read: {err}."
