r"""Check ``rasd plan`` against two real servers: the same arrivals, simulated and served.

Each server has one core and one thread. Costs are measured on one of them first, alone.

    python examples/benchmarks/serving_plan.py --model small --seconds 240 --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from machine import machine
from serving_replicas import free_port, wait_for

from rasd_integrations.serving.plan import (
    Arrival,
    Costs,
    Fleet,
    Load,
    Served,
    percentile,
    simulate,
)

_SERVERS = 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="small")
    parser.add_argument("--rate", type=float, default=0.6, help="requests a second")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--document-tokens", type=int, default=800)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def one_thread() -> dict[str, str]:
    """Return the environment of a process with one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def pinned(core: int, *command: str) -> list[str]:
    """Return ``command`` on one core."""
    return ["taskset", "-c", str(core), *command]


def measured(args: argparse.Namespace, folder: Path) -> Costs:
    """Measure the costs of one server on one core."""
    path = folder / "costs.json"
    command = [
        sys.executable,
        "-m",
        "rasd_integrations",
        "plan",
        str(path),
        "--measure",
        args.model,
    ]
    subprocess.run(pinned(0, *command), check=True, env=one_thread())  # noqa: S603
    return Costs.read(path)


def document(number: int, tokens: int) -> str:
    """Return a text of about so many tokens, which begins as no other does."""
    return f"{number}. " + " ".join(
        f"Item {n} of list {number} is new." for n in range(tokens // 9)
    )


async def served(urls: list[str], arrivals: list[Arrival]) -> list[dict[str, Any]]:
    """Ask as the arrivals say, each document at its server; return what each request took."""
    async with httpx.AsyncClient(timeout=300) as client:
        started = time.monotonic()

        async def ask(number: int, arrival: Arrival) -> dict[str, Any]:
            await asyncio.sleep(max(started + arrival.at - time.monotonic(), 0))
            asked = time.monotonic()
            url = urls[arrival.document % len(urls)]
            text = f"{document(arrival.document, arrival.document_tokens)}\n\nQuestion {number}: what is new?"
            body = {
                "messages": [{"role": "user", "content": text}], "max_tokens": arrival.answer_tokens,
                "ignore_eos": True, "rasd": {"drafting": False},
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            first = usage = None
            async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as got:
                got.raise_for_status()
                async for line in got.aiter_lines():
                    event = json.loads(line[6:]) if line.startswith("data: {") else {}
                    said = [c for c in event.get("choices", ()) if c["delta"].get("content")]
                    if said and first is None:
                        first = time.monotonic()
                    usage = event.get("usage") or usage
            ends = time.monotonic()
            tokens = usage["completion_tokens"] if usage else 1
            begun = first or ends
            return {
                "first_s": begun - asked, "per_token_s": (ends - begun) / max(tokens - 1, 1),
                "prompt_tokens": usage["prompt_tokens"] if usage else 0,
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"] if usage else 0,
            }  # fmt: skip

        return await asyncio.gather(*(ask(n, arrival) for n, arrival in enumerate(arrivals)))


def compared(real: list[dict[str, Any]], planned: list[Served]) -> dict[str, Any]:
    """Return percentiles of both, and their ratios."""
    out: dict[str, Any] = {}
    for name in ("first_s", "per_token_s"):
        for share in (0.5, 0.99):
            own = percentile([one[name] for one in real], share)
            said = percentile([getattr(one, name) for one in planned], share)
            out[f"{name} p{share * 100:g}"] = {
                "served": round(own, 4), "planned": round(said, 4), "ratio": round(said / own, 3),
            }  # fmt: skip
    return out


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure, serve, simulate, and print how they differ."""
    args = parse(argv)
    folder = Path(args.out).parent if args.out else Path.cwd()
    costs = measured(args, folder)
    load = Load(
        rate=args.rate, documents=args.documents, document_tokens=args.document_tokens,
        question_tokens=20, answer_tokens=args.answer_tokens, seconds=args.seconds,
    )  # fmt: skip
    arrivals = load.arrivals(args.seed)
    ports = [free_port() for _ in range(_SERVERS)]
    with ExitStack() as stack:
        for core, port in enumerate(ports):
            command = [sys.executable, "-m", "rasd_integrations", "serve", args.model, "--port", str(port)]  # fmt: skip
            process = subprocess.Popen(  # noqa: S603
                pinned(core, *command), env=one_thread(), stderr=subprocess.DEVNULL
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        for port in ports:
            wait_for(f"http://127.0.0.1:{port}/ready")
        real = asyncio.run(served([f"http://127.0.0.1:{port}" for port in ports], arrivals))
    # The template and the question make a prompt longer than its document: the measured length counts.
    asked = statistics.median(one["prompt_tokens"] for one in real)
    known = [
        one["cached_tokens"] for one in real if one["cached_tokens"] > args.document_tokens // 2
    ]
    document_tokens = int(statistics.median(known)) if known else args.document_tokens
    sized = [
        Arrival(a.at, a.document, document_tokens, int(asked) - document_tokens, a.answer_tokens)
        for a in arrivals
    ]
    planned = simulate(sized, costs, Fleet(replicas=_SERVERS))
    found = {
        "options": {n: v for n, v in vars(args).items() if n != "out"},
        "machine": machine(),
        "costs": costs.as_dict(),
        "requests": len(real),
        "in cache": {
            "served": round(sum(one["cached_tokens"] > document_tokens // 2 for one in real) / len(real), 3),
            "planned": round(sum(one.known for one in planned) / len(planned), 3),
        },
        **compared(real, planned),
    }  # fmt: skip
    print(json.dumps({n: v for n, v in found.items() if n not in ("machine", "options")}, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
