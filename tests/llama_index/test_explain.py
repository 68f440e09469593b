"""``explain`` of the LlamaIndex LLM: what ``complete`` and ``chat`` take, and the answers that they give."""

from __future__ import annotations

import pytest

pytest.importorskip("llama_index.core")

from cases_llama_index import NODES, QUESTION
from llama_index.core.base.llms.types import ChatMessage
from scripted import scripted_model

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.llama_index import RASDLLM

SPAN = "The lighthouse at Cape Wrath was built by Robert Stevenson"


def saying(said, **options):
    llm = RASDLLM.from_model(*scripted_model(said), max_tokens=300, **options)
    llm._trace._retrievals.clear()  # of the tests before
    return llm


def echo(prompt):
    """Say how the prompt ends, so that another prompt is another answer."""
    return prompt[-60:].replace("<|im_start|>", "[").replace("<|im_end|>", "]")


@pytest.mark.parametrize("options", [{}, {"formatted": True}, {"stop": ["s"]}, {"drafter": None}])
def test_a_text_is_explained_as_complete_answers_it(options):
    """As a user's message or verbatim, with the call's own options."""
    llm = saying(echo, system_prompt="Be brief.")
    answer = llm.explain(QUESTION, **options)
    assert answer.text == llm.complete(QUESTION, **options).text
    assert "".join(token.text for token in answer.tokens) == answer.text != ""
    off = "drafting is off for this call" in answer.off_reasons
    assert off == ("drafter" in options)


def test_messages_are_explained_as_chat_answers_them():
    """The same prompt; options that are not of ``chat`` are refused."""
    llm, messages = saying(echo), [ChatMessage("Be brief.", role="system"), ChatMessage(QUESTION)]
    answer = llm.explain(messages, max_tokens=20)
    assert answer.text == llm.chat(messages, max_tokens=20).message.content
    with pytest.raises(ConfigurationError, match="formatted"):
        llm.explain(messages, formatted=True)


def test_a_prompt_is_explained_with_its_quotes():
    """Of the chunks that the call names."""
    llm = saying(lambda prompt: f"It is said: {SPAN}, I think.")
    sent = f"{NODES[0].text}\n\n{NODES[1].text}\n\n{QUESTION}"
    answer = llm.explain(sent, rasd={"chunks": NODES[:2]})
    assert [(quote.text, quote.chunk_id) for quote in answer.quotes] == [(SPAN, "n0")]
    assert "chunk n0, at character 0" in answer._repr_html_()
