r"""Compare forms of a model's weights: load, memory, disk, step times, and likelihood of references.

Each form is loaded twice in processes of its own, the first time into an empty cache folder.

    python examples/benchmarks/weights.py --model coder-0.5b --out examples/benchmarks/results/weights_coder.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from answers import peak_mib
from machine import machine
from report import table
from tasks import data_or_exit

from rasd_integrations.demo.models import demo_model
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.runtime.models import shared_model

FORMS = ("dense", "kept", "int8", "int4")
ROWS = (1, 5, 9, 17)
_PREFIX, _TIMES, _PIECE, _REFERENCE = 1000, 15, 16, 64
_TASK = "scientific_qa"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="small", help="small, coder-0.5b, coder-1.5b or a path")
    parser.add_argument("--forms", default=",".join(FORMS), help="of weights=, by commas")
    parser.add_argument("--references", type=int, default=40, help="0: no likelihoods")
    parser.add_argument("--data", type=Path, help="folder with leval/ (default: RASD_DATA)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> dict[str, Any]:
    """Load one form and measure it."""
    start = time.perf_counter()
    shared = shared_model(args.model, {}, cache_dir=Path(args.cache), weights=args.worker)
    loaded = time.perf_counter() - start
    peak = peak_mib()
    target = shared.target
    steps = step_times(target)
    losses = [loss(shared, *pair) for pair in references(args)] if args.references else []
    return {
        "load_s": loaded, "load_peak_mib": peak, "peak_mib": peak_mib(), "steps_ms": steps,
        "losses": losses, "executor": target.executor_name,
    }  # fmt: skip


def step_times(target: TargetModel) -> dict[str, float]:
    """Return the median milliseconds of a step by its rows, widths by turns."""
    ids = [(97 * i) % 5000 + 10 for i in range(_PREFIX)]
    buffer = KVBuffer(_PREFIX + 64)
    for _ in target.prefill(ids, buffer):
        pass
    taken: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for rows in ROWS:
        for repeat in range(_TIMES + 2):
            start = time.perf_counter()
            target.step(ids[:rows], buffer)
            if repeat >= 2:  # warm
                taken[rows].append(1e3 * (time.perf_counter() - start))
    return {str(rows): statistics.median(each) for rows, each in taken.items()}


def references(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return questions with a piece of their document, and the right answers."""
    pairs = []
    path = data_or_exit(args.data) / "leval" / f"{_TASK}.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for question, answer in zip(row["instructions"], row["outputs"], strict=True):
            pairs.append((f"{row['input'][:3000]}\n\nQuestion: {question}\nAnswer:", f" {answer}"))
    return pairs[:: max(1, len(pairs) // args.references)][: args.references]


def loss(shared: Any, prompt: str, reference: str) -> float:
    """Return a reference's negative log-likelihood a token, in nats."""
    tokenizer, target = shared.tokenizer, shared.target
    ids = tokenizer.encode(prompt)
    wanted = tokenizer.encode(reference, add_special_tokens=False)[:_REFERENCE]
    buffer = KVBuffer(len(ids) + len(wanted))
    for _ in target.prefill(ids[:-1], buffer):
        pass
    given = [ids[-1], *wanted[:-1]]
    total = 0.0
    for first in range(0, len(given), _PIECE):
        piece = given[first : first + _PIECE]
        logits = target.step(piece, buffer).float().log_softmax(-1)
        buffer.commit(range(len(piece)))
        rows = torch.tensor(wanted[first : first + len(piece)])[:, None]
        total -= float(logits.gather(1, rows).sum())
    return total / len(wanted)


def measured(args: argparse.Namespace, form: str) -> dict[str, Any]:
    """Load a form twice, each time in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--model", args.model, "--worker", form]
        command += ["--cache", cache]
        if args.data:
            command += ["--data", str(args.data)]
        first, later = (
            json.loads(
                subprocess.run(  # noqa: S603 -- this file
                    [*command, "--references", str(number)], check=True, stdout=subprocess.PIPE
                ).stdout.splitlines()[-1]
            )
            for number in (0, args.references)
        )
        disk = sum(file.stat().st_size for file in Path(cache).rglob("*") if file.is_file())
    return {
        "form": form, "first_load_s": first["load_s"], "first_peak_mib": first["load_peak_mib"],
        "disk_mib": disk / 2**20, **later,
    }  # fmt: skip


def against(losses: list[float], dense: list[float]) -> str:
    """Return the mean change of the losses with a 95 % interval over references."""
    if not losses or not dense:
        return "-"
    change = np.array(losses) - np.array(dense)
    draws = np.random.default_rng(0).integers(0, len(change), (2000, len(change)))
    low, high = np.percentile(change[draws].mean(1), [2.5, 97.5])
    return f"{change.mean():+.4f} [{low:+.4f}, {high:+.4f}]"


def main() -> None:
    """Measure all forms and print a table and one JSON document."""
    args = parse()
    if args.worker:
        print(json.dumps(work(args)))
        return
    args.model = demo_model(args.model)
    rows: list[dict[str, Any]] = []
    document = {"model": Path(args.model).name, "references": args.references, "rows": rows}
    document |= {"machine": machine()}
    dense: list[float] = []
    for form in args.forms.split(","):
        row = measured(args, form)
        losses = row.pop("losses")
        dense = losses if form == "dense" else dense
        rows.append({**row, "nats": against(losses, dense)})
        if args.out:  # after each, so that a long run that is broken off has kept what it found
            args.out.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document, "weights"), file=sys.stderr)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
