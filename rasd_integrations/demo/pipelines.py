"""The demo's two pipelines: retrieve eight chunks, read their documents whole, answer.

Both write the same prompt, token for token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from langchain_chroma import Chroma
    from langchain_core.runnables import Runnable
    from llama_index.core import VectorStoreIndex
    from llama_index.core.base.base_query_engine import BaseQueryEngine
    from llama_index.core.llms import LLM

TOP_K = 8
TEMPLATE = """{context}

Question: {question}
Answer from the text above."""


def whole_documents(names: Iterable[str], texts: Mapping[str, str], characters: int) -> str:
    """Return the named documents in full, best first up to ``characters``, the best one last.

    The order depends on the search alone, so questions on one topic share a cached prefix, and small
    models read best what is next to the question.
    """
    chosen: dict[str, str] = {}
    room = characters
    for name in names:
        if name not in chosen and room > 0:
            chosen[name] = texts[name][:room]
            room -= len(chosen[name])
    return "\n\n".join(reversed(chosen.values()))


def langchain_prompt(
    store: Chroma, texts: Mapping[str, str], characters: int
) -> Runnable[dict[str, str], Any]:
    """Return the chain up to the LLM, from ``{"search", "question"}`` to a prompt."""
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_core.runnables import RunnableParallel

    def read(found: list[Any]) -> str:
        return whole_documents((d.metadata["source"] for d in found), texts, characters)

    retriever = store.as_retriever(search_kwargs={"k": TOP_K})
    inputs = RunnableParallel(
        context=itemgetter("search") | retriever | read, question=itemgetter("question")
    )
    return inputs | ChatPromptTemplate.from_messages([("user", TEMPLATE)])


def llama_index_engine(
    index: VectorStoreIndex, texts: Mapping[str, str], characters: int, llm: LLM
) -> BaseQueryEngine:
    """Return the same pipeline as a streaming LlamaIndex query engine."""
    from llama_index.core import PromptTemplate
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    class _WholeDocuments(BaseNodePostprocessor):
        def _postprocess_nodes(
            self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
        ) -> list[NodeWithScore]:
            names = (n.node.metadata["source"] for n in nodes)
            text = whole_documents(names, texts, characters)
            return [NodeWithScore(node=TextNode(text=text), score=1.0)]

    template = TEMPLATE.format(context="{context_str}", question="{query_str}")
    return index.as_query_engine(
        llm=llm,
        similarity_top_k=TOP_K,
        node_postprocessors=[_WholeDocuments()],
        text_qa_template=PromptTemplate(template),
        streaming=True,
    )
