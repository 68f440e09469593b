"""Names what a request reads, so that a router sends requests on the same text to the same server."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

from rasd_integrations.retrieval.documents import document_name
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.types import Message

SESSION = "X-Session-ID"
"""The header that routers with consistent hashing read."""

_BEGINNING = 1024  # characters
_DIGITS = 16
_SYSTEM = ("system", "developer")


def session_id(request: Request) -> str:
    """Return a name for what a request reads; requests with one name should go to one server.

    A server has the keys and values of the documents that it has read. So the name is that of the set of documents
    that the request's chunks are from, whatever the question. Without such chunks it is that of the beginning of the
    prompt, which the turns of a conversation share; of the system message and of the first user's apart, since a long
    system message is common to all users. It is a digest, so that no text is in a router's log.
    """
    chunks = request.hints.chunks if request.hints is not None else ()
    documents = {name for chunk in chunks if (name := document_name(chunk))}
    parts = sorted(documents) or _beginnings(request.prompt)
    written = "\0".join(parts).encode("utf-8", "backslashreplace")
    return hashlib.sha256(written).hexdigest()[:_DIGITS]


def session_headers(request: Request, given: Collection[str]) -> dict[str, str]:
    """Return the header of a request, unless ``given``, the user's own headers, have it."""
    is_given = SESSION.lower() in {name.lower() for name in given}
    return {} if is_given else {SESSION: session_id(request)}


def _beginnings(prompt: str | Sequence[Message]) -> list[str]:
    if isinstance(prompt, str):
        return [prompt[:_BEGINNING]]
    texts = (_first(prompt, roles) for roles in (_SYSTEM, ("user",)))
    return [text[:_BEGINNING] for text in texts]


def _first(messages: Sequence[Message], roles: Collection[str]) -> str:
    """Return the first text of a role; empty: there is none."""
    return next((str(m.get("content") or "") for m in messages if m.get("role") in roles), "")
