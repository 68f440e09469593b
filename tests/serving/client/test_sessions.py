"""Requests that read the same text have one name, which travels with each."""

from __future__ import annotations

import re

import pytest
from fake_server import OTHER, RASD, VLLM, Says, fake_server

from rasd_integrations.prompting import PromptHints
from rasd_integrations.runtime.pipeline import Request
from rasd_integrations.serving.client.connection import ServerOptions
from rasd_integrations.serving.client.remote import RemoteRASD
from rasd_integrations.serving.client.sessions import session_id
from rasd_integrations.types import Chunk

SECRET = "The treasure lies under the oak."
ANSWERED = Says(
    [{"choices": [{"text": "Four.", "delta": {"content": "Four."}, "finish_reason": "stop"}]}]
)


def chunk(source, text="x", **metadata):
    """Return a chunk of a document."""
    return Chunk(text, metadata={"source": source, **metadata})


def about(*chunks, question="Who?"):
    """Return the name of a question on chunks."""
    messages = [{"role": "user", "content": question}]
    return session_id(Request(messages, hints=PromptHints(chunks=chunks, question=question)))


def said(*contents, system=""):
    """Return the name of a conversation, whose turns alternate."""
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    return session_id(
        Request([*([{"role": "system", "content": system}] if system else []), *turns])
    )


# --- documents ---


def test_the_same_documents_have_one_name():
    """Whatever the question, the order, the place in the document, and how many chunks of each were found."""
    first = about(chunk("a", "one", page=1), chunk("b", "two"))
    assert first == about(
        chunk("b", "three", page=9), chunk("a", "four"), chunk("a", "five"), question="Why?"
    )
    assert first == session_id(
        Request("A text", hints=PromptHints(chunks=(chunk("a"), chunk("b"))))
    )


def test_other_documents_have_other_names():
    """One more, one less, another one, and one of that name under another key."""
    chunks = [
        (chunk("a"),), (chunk("b"),), (chunk("a"), chunk("b")), (chunk("ab"),),
        (Chunk("x", metadata={"file_name": "a"}),), (chunk("a\0source=b"),) * 0 or (chunk("c"), chunk("a")),
    ]  # fmt: skip
    assert len({about(*one) for one in chunks}) == len(chunks)


def test_the_widest_key_names_the_document():
    """Pages of a file that were loaded apart have ids of their own."""
    pages = [chunk("a", doc_id=f"page {n}") for n in range(2)]
    assert about(pages[0]) == about(pages[1]) == about(chunk("a"))


def test_chunks_without_a_document_name_nothing():
    """Beside others they do not count; alone, the prompt's beginning does."""
    bare, lost = Chunk("x", id="1"), Chunk("y", metadata={"ref_doc_id": "None", "source": ""})
    assert about(bare, chunk("a"), lost) == about(chunk("a"))
    assert about(bare, lost) == said("Who?") != about(bare, question="Why?")


# --- conversations and texts ---


def test_later_turns_keep_the_name():
    """Another conversation has another."""
    names = [said("Hello", *["Yes.", "Go on."] * n, system="Be kind.") for n in range(4)]
    assert len({*names}) == 1
    assert len({names[0], said("Hello"), said("Hullo", system="Be kind."), said("Hello", system="Be rude.")}) == 4  # fmt: skip


def test_the_beginning_counts():
    """1,024 characters of each message: a system message that all users share does not hide theirs."""
    long = "x" * 1024
    assert said(long + "a") == said(long + "b")
    assert said(long[1:] + "a") != said(long[1:] + "b")
    assert said("a", system=long) != said("b", system=long)
    assert session_id(Request(long + "a")) == session_id(Request(long + "b"))
    assert session_id(Request(long[1:] + "a")) != session_id(Request(long[1:] + "b"))


def test_any_prompt_has_a_name():
    """No user, no text, lone surrogates."""
    prompts = ["", "\ud800", [], [{"role": "user", "content": None}], [{"role": "assistant", "content": "Go."}]]  # fmt: skip
    for prompt in prompts:
        assert re.fullmatch("[0-9a-f]{16}", session_id(Request(prompt)))


def test_a_name_is_known_beforehand():
    """Processes of any version agree, or a router would send them apart; no text is in it."""
    assert about(chunk("a"), chunk("b")) == "200baac4ad2f3974"
    assert said("Hello", system="Be kind.") == "9f19b89eb45e5ec3"
    assert session_id(Request("Once upon")) == "efbdcfb2f3e2e832"


# --- over HTTP ---


@pytest.mark.parametrize("card", [RASD, VLLM, OTHER], ids=["rasd", "vllm", "other"])
@pytest.mark.parametrize(
    "prompt", [SECRET, [{"role": "user", "content": SECRET}]], ids=["text", "chat"]
)
async def test_the_header_arrives(card, prompt):
    """With each answer, of threads, streams and event loops, and when it is asked for again."""
    request = Request(prompt)
    busy = Says(status=429, body={"error": {"message": "Busy."}}, headers={"Retry-After": "0.01"})
    with fake_server(busy, ANSWERED, cards=[card]) as server:
        engine = RemoteRASD(ServerOptions(base_url=server.base_url, max_retries=1))
        engine.generate(request)
        list(engine.stream(request))
        await engine.agenerate(request)
        assert [delta async for delta in engine.astream(request)]
        engine.close()

    sent = [h["x-session-id"] for h, path in zip(server.headers, server.paths, strict=True) if "completions" in path]  # fmt: skip
    assert [session_id(request)] * 5 == sent


@pytest.mark.parametrize("name", ["X-Session-ID", "x-session-id"])
async def test_the_users_own_header_wins(name):
    """It may name a tenant or a shard."""
    with fake_server() as server:
        engine = RemoteRASD(
            ServerOptions(
                base_url=server.base_url, client_kwargs={"default_headers": {name: "mine"}}
            )
        )
        engine.generate(Request("Who?"))
        await engine.agenerate(Request("Who?"))
        engine.close()

    assert {"mine"} == {headers["x-session-id"] for headers in server.headers}
