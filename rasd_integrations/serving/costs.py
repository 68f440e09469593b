"""``rasd plan``: measures what a model's work takes on this machine, and prints how many servers a load needs."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rasd_integrations.config import SamplingParams
from rasd_integrations.errors import ConfigurationError
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.runtime.together import as_they_end
from rasd_integrations.serving.plan import Costs, Fleet, Load, at, plan
from rasd_integrations.serving.server.engines import engines_for
from rasd_integrations.serving.server.settings import ServerSettings

_LENGTHS = (64, 256, 1024, 4096)
_ANSWERS = (1, 2, 4, 8)
_STEPS, _TIMES = 24, 3


def measure(engine: RASD) -> Costs:
    """Return the costs of a loaded model on this machine; nothing else should run on it."""
    texts = _texts(engine)
    lengths = [n for n in _LENGTHS if n + _STEPS + 64 < engine.window] or [engine.window // 2]
    _seconds(engine, [next(texts)(64)], 4)  # compiles, warms up
    prefill = [(float(n), _median(partial(_prefill_s, engine, texts, n))) for n in lengths]
    steps = [(float(k), _median(partial(_step_s, engine, texts, k, lengths[0]))) for k in _ANSWERS]
    slope = 0.0
    if len(lengths) > 1:
        long = _median(partial(_step_s, engine, texts, 1, lengths[-1]))
        slope = max((long - steps[0][1]) / (lengths[-1] - lengths[0]), 0.0)
    known = next(texts)(64)
    engine.generate(known, _params(1))
    whole = _median(lambda: _timed(engine, known)) - steps[0][1]
    return Costs(
        prefill_s=tuple(prefill), step_s=tuple(steps), step_s_per_token=slope, overhead_s=max(whole, 0.0),
        alone_s=_median(partial(_drafted_s, engine)),
    )  # fmt: skip


def _texts(engine: RASD) -> Iterator[Any]:
    """Yield functions that return a text of about so many tokens, which begins as no other does."""
    for number in count():

        def text(tokens: int, number: int = number) -> str:
            words = f"{number} " + "".join(f"word {n} of {number}, " for n in range(tokens))
            ids = engine.encode(words)[:tokens]
            return str(engine.tokenizer.decode(ids))

        yield text


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, drafting=False, ignore_eos=True, temperature=0.0)


def _prefill_s(engine: RASD, texts: Iterator[Any], tokens: int) -> float:
    seconds: float = engine.generate(next(texts)(tokens), _params(1)).stats.prefill_s
    return seconds


def _drafted_s(engine: RASD) -> float:
    """Return the seconds of a step with drafts, over a text that is easy to draft for."""
    params = replace(_params(2 * _STEPS), drafting=True)
    stats = engine.generate("one two three four five six seven eight " * 20, params).stats
    return (stats.draft_s + stats.verify_s) / max(stats.target_steps, 1)


def _step_s(engine: RASD, texts: Iterator[Any], answers: int, tokens: int) -> float:
    """Return the seconds of a step of so many answers, after their prefills."""
    prompts = [next(texts)(tokens) for _ in range(answers)]
    for prompt in prompts:
        engine.generate(prompt, _params(1))
    return _seconds(engine, prompts, _STEPS) / _STEPS


def _seconds(engine: RASD, prompts: Sequence[str], tokens: int) -> float:
    jobs = [partial(engine.generate, prompt, _params(tokens)) for prompt in prompts]
    started = time.perf_counter()
    with closing(as_they_end(jobs, len(jobs))) as ended:
        for _ in ended:
            pass
    return time.perf_counter() - started


def _timed(engine: RASD, prompt: str) -> float:
    return _seconds(engine, [prompt], 1)


def _median(run: Callable[[], float]) -> float:
    return statistics.median(run() for _ in range(_TIMES))


# --- the command ---


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the load, the servers and the limits."""
    add = parser.add_argument
    add("file", metavar="COSTS", help="costs in JSON, which --measure writes")
    add(
        "--measure",
        dest="model",
        metavar="MODEL",
        help="measure them first; needs the machine for itself",
    )
    kinds: Mapping[str, Any] = {"int": int, "float": float}
    for record in (Load, Fleet):
        for f in fields(record):
            if f.name in ("replicas", "affinity"):
                continue
            add(f"--{f.name.replace('_', '-')}", type=kinds[str(f.type)], default=None, metavar="N",
                help="" if f.name == "rate" else f"({f.default})")  # fmt: skip
    add(
        "--tokens-a-step",
        type=float,
        metavar="N",
        help="of an answer alone, with drafts; /metrics tells it (1)",
    )
    add("--first-token", type=float, default=2.0, metavar="S", help="limit at p99, seconds (2)")
    add("--per-token", type=float, default=0.2, metavar="S", help="limit at p99, seconds (0.2)")
    add("--most", type=int, default=16, metavar="N", help="servers that are tried (16)")
    add("--seed", type=int, default=0, metavar="N", help="of the arrivals (0)")


def run_plan(given: Mapping[str, Any]) -> int:
    """Measure if asked for, then print the plan if there is a rate; return 1 if no number of servers keeps the limits.

    Raises:
        ConfigurationError: Nothing to do, or values out of range.
        ModelLoadError: The model cannot be loaded.
    """
    path, model, rate = Path(given["file"]), given.get("model"), given.get("rate")
    if model is None and rate is None:
        msg = (
            "There is nothing to do: give --measure MODEL, or --rate of requests a second, or both."
        )
        raise ConfigurationError(msg)
    if model is not None:
        _measure_into(path, ServerSettings.read({"model": model}))
    if rate is None:
        return 0
    costs = Costs.read(path)
    if (tokens := given.get("tokens_a_step")) is not None:
        costs = replace(costs, alone_tokens=tokens)
    load, fleet = _record(Load, given), _record(Fleet, {**given, "replicas": 1})
    rows = plan(
        load, costs, fleet, most=given["most"], first_s=given["first_token"],
        token_s=given["per_token"], seed=given["seed"],
    )  # fmt: skip
    print(table(rows))  # noqa: T201  (what the command is for)
    cold = at(costs.prefill_s, load.document_tokens + load.question_tokens)
    print(f"\nA document that no server has read takes {cold:.2f} s to its first token, alone.")  # noqa: T201
    keeps = rows[-1]["keeps"]
    told = (
        f"{rows[-1]['replicas']} servers keep the limits"
        if keeps
        else "No number of these servers keeps the limits"
    )
    limits = f"first token {given['first_token']:g} s, each further {given['per_token']:g} s"
    print(f"{told}: {limits}, at p99")  # noqa: T201
    return 0 if keeps else 1


def _record(kind: type[Any], given: Mapping[str, Any]) -> Any:
    return kind(**{f.name: given[f.name] for f in fields(kind) if given.get(f.name) is not None})


def _measure_into(path: Path, settings: ServerSettings) -> None:
    engines = engines_for(settings)
    try:
        engine = engines.get("", {})
        engine.ensure_loaded()
        print("measuring; a minute or two", file=sys.stderr)  # noqa: T201
        found = {"model": settings.model, "costs": measure(engine).as_dict()}
    finally:
        engines.close()
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the plan as aligned lines."""
    heads = (
        "servers",
        "affinity",
        "first token p50",
        "p99",
        "each further p50",
        "p99",
        "refused",
        "in cache",
    )
    lines: list[tuple[str, ...]] = [heads]
    for row in rows:
        for name in ("affinity", "no affinity", "no drafts"):
            if (one := row.get(name)) is None:
                continue
            seconds = [
                f"{one[key]:.3f} s" for key in ("first p50", "first p99", "token p50", "token p99")
            ]
            shares = [f"{one[key]:.0%}" for key in ("refused", "known")]
            lines.append((str(row["replicas"]), name, *seconds, *shares))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(v.rjust(w) for v, w in zip(line, widths, strict=True)) for line in lines
    )
