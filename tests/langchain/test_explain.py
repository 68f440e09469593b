"""``explain`` of both LangChain models: what ``invoke`` takes, and the answer that ``invoke`` gives."""

from __future__ import annotations

import pytest
from cases_langchain import ABOUT_ADA, ADA, PROMPT, joined, memory_store
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnablePassthrough
from scripted import scripted_model

from rasd_integrations.langchain import RASDLLM, ChatRASD
from rasd_integrations.langchain.errors import ConfigurationError

SAID = f"Well: {ADA} And that was in London."
INPUTS = [
    ABOUT_ADA,
    [("system", "Be brief."), ("human", ABOUT_ADA)],
    [SystemMessage("Be brief."), HumanMessage(ABOUT_ADA)],
    PROMPT.invoke({"context": ADA, "question": ABOUT_ADA}),
]


def saying(kind, said=lambda prompt: SAID, **options):
    return kind.from_model(*scripted_model(said), max_tokens=300, **options)


def echo(prompt):
    """Say how the prompt ends, so that another prompt is another answer."""
    return prompt[-60:].replace("<|im_start|>", "[").replace("<|im_end|>", "]")


@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
@pytest.mark.parametrize("value", INPUTS, ids=["text", "pairs", "messages", "prompt"])
def test_it_takes_what_invoke_takes(kind, value):
    """Text, messages and filled prompts are the same prompt as for ``invoke``, and so the same answer."""
    llm = saying(kind, echo)
    told = llm.invoke(value)
    answer = llm.explain(value)
    assert answer.text == (told.text if kind is ChatRASD else told)
    assert "".join(token.text for token in answer.tokens) == answer.text
    assert ABOUT_ADA[-9:] in answer.text


@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
def test_options_of_the_call_hold(kind):
    """Stop strings, lengths and drafting are those of ``invoke``; an unknown option is refused as there."""
    llm = saying(kind)
    for options in ({"stop": ["And"]}, {"max_tokens": 7}, {"drafter": None}):
        told = llm.invoke(ABOUT_ADA, **options)
        answer = llm.explain(ABOUT_ADA, **options)
        assert answer.text == (told.text if kind is ChatRASD else told)
    assert "drafting is off for this call" in answer.off_reasons
    with pytest.raises(ConfigurationError, match="max_token"):
        llm.explain(ABOUT_ADA, max_token=3)


@pytest.mark.parametrize("kind", [ChatRASD, RASDLLM])
def test_the_prompt_of_a_chain_is_explained_with_its_quotes(kind):
    """The part of the chain before the model fills the prompt; what it retrieved is known as in the chain."""
    llm, store = saying(kind), memory_store()
    prompt = PROMPT if kind is ChatRASD else PromptTemplate.from_template("{context}\n\n{question}")
    retriever = store.as_retriever(search_kwargs={"k": 3})
    filled = {"context": retriever | joined, "question": RunnablePassthrough()} | prompt
    (document,) = [d for d in store.similarity_search(ABOUT_ADA) if d.page_content == ADA]
    answer = llm.explain(filled.invoke(ABOUT_ADA))
    (quote,) = answer.quotes
    assert (quote.text, quote.chunk_id) == (ADA[:-1], document.id)
    assert f"chunk {document.id}, at character 0. source: 0.txt" in answer._repr_html_()


def test_tools_are_explained():
    """A call's markup is decoded as in ``invoke``, and its name and JSON are shown at their tokens."""

    def look(name: str) -> str:
        """Look a name up."""
        return name

    said = 'Let me look.\n<tool_call>\n{"name": "look", "arguments": {"name": "Ada"}}\n</tool_call>'
    llm = saying(ChatRASD, lambda prompt: said)
    answer = llm.explain("Who?", **llm.bind_tools([look]).kwargs)
    assert answer.text == "Let me look."
    assert "".join(token.call for token in answer.tokens) == 'look{"name": "Ada"}'
