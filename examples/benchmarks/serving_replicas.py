r"""Put two servers behind vllm-router, kill one under load, and count what is lost, what moves, and for how long.

Each document is asked about again and again, with its own ``X-Session-ID``. The router is a package of its own:
``pip install vllm-router`` (in any environment).

    python examples/benchmarks/serving_replicas.py --router vllm-router --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from machine import machine
from serving_load import questions, shown_percentile

_ANSWER, _START_S = 16, 180.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="small", help="what rasd serve takes")
    parser.add_argument("--router", default="vllm-router", help="its command")
    parser.add_argument("--policy", default="consistent_hash", help="of the router")
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=30.0, help="before the kill, and after it")
    parser.add_argument("--retries", type=int, default=3, help="of a client, in the second run")
    parser.add_argument("--serve", default="", help="further flags of rasd serve")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when, about what, who answered (``None``: nobody), how many tries, prompt tokens that were known."""

    at: float
    took: float
    document: int
    by: str | None
    tries: int
    cached: int = 0


class Clients:
    """Clients of one router."""

    def __init__(self, url: str, args: argparse.Namespace, tries: int) -> None:
        """Ask nothing yet; a request is tried ``tries`` times."""
        self.url, self.args, self.tries = url, args, tries
        self.asks = questions(args.documents)
        self.done: list[Asked] = []
        self.begun = time.monotonic()

    async def run(self, kill: Any) -> float:
        """Ask until the time is over; return when ``kill`` was called."""
        ends = self.begun + 2 * self.args.seconds

        async def client(number: int) -> None:
            async with httpx.AsyncClient(timeout=60) as http:
                turn = number
                while time.monotonic() < ends:
                    self.done.append(await self._ask(http, turn % self.args.documents))
                    turn += self.args.clients + 1

        async def killer() -> float:
            await asyncio.sleep(self.args.seconds)
            kill()
            return time.monotonic() - self.begun

        *_, at = await asyncio.gather(*map(client, range(self.args.clients)), killer())
        return float(at or 0.0)

    async def _ask(self, http: httpx.AsyncClient, document: int) -> Asked:
        body = {"messages": self.asks[document], "max_tokens": _ANSWER}
        started = time.monotonic()
        for attempt in range(1, self.tries + 1):
            try:
                headers = {"X-Session-ID": f"document-{document}"}
                got = await http.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)
            except httpx.HTTPError:
                got = None
            if got is not None and got.status_code == 200:
                said = got.json()
                cached = said["usage"]["prompt_tokens_details"]["cached_tokens"]
                took = time.monotonic() - started
                return Asked(started - self.begun, took, document, said["model"], attempt, cached)
            await asyncio.sleep(0.2 * attempt)
        return Asked(started - self.begun, time.monotonic() - started, document, None, self.tries)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str) -> float:
    """Wait until ``url`` answers with 200; return the seconds it took."""
    started = time.monotonic()
    while time.monotonic() - started < _START_S:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return time.monotonic() - started
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    sys.exit(f"{url} does not answer.")


def one_run(args: argparse.Namespace, tries: int) -> dict[str, Any]:
    """Start two servers and the router, kill the busier server under load, and return what happened."""
    with ExitStack() as stack:

        def start(*command: str) -> subprocess.Popen[bytes]:
            quiet = subprocess.DEVNULL
            process = subprocess.Popen(command, stdout=quiet, stderr=quiet)  # noqa: S603
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        ports = [free_port(), free_port()]
        command = [sys.executable, "-m", "rasd_integrations", "serve", args.model]
        serve = [*command, *args.serve.split()]
        servers = {
            f"r{n}": start(*serve, "--port", str(port), "--name", f"r{n}")
            for n, port in enumerate(ports)
        }
        for port in ports:
            wait_for(f"http://127.0.0.1:{port}/ready")
        own, told = free_port(), free_port()
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        router = start(
            args.router, "--port", str(own), "--policy", args.policy, "--prometheus-port", str(told),
            "--health-check-endpoint", "/ready", "--health-check-interval-secs", "2", "--worker-urls", *urls,
        )  # fmt: skip
        clients = Clients(f"http://127.0.0.1:{own}", args, tries)
        up = wait_for(f"{clients.url}/health")

        def kill() -> None:
            busy = Counter(a.by for a in clients.done if a.by).most_common(1)[0][0]
            servers[busy].send_signal(signal.SIGKILL)

        clients.begun = time.monotonic()
        at = asyncio.run(clients.run(kill))
        memory = re.findall(
            r"VmRSS:\s+(\d+)", Path(f"/proc/{router.pid}/status").read_text("ascii")
        )
        router_mib = int(memory[0]) // 1024
    return {"router up s": round(up, 2), "router MiB": router_mib, **outcome(clients, at)}


def outcome(clients: Clients, at: float) -> dict[str, Any]:
    """Return what was lost, what moved, and how long that took after the kill ``at``."""
    places: dict[bool, dict[int, set[str]]] = {False: defaultdict(set), True: defaultdict(set)}
    for asked in clients.done:
        if asked.by is not None:
            places[asked.at + asked.took > at][asked.document].add(asked.by)
    before, after = places[False], places[True]
    single = [next(iter(by)) for by in before.values() if len(by) == 1]
    harmed = [a for a in clients.done if a.by is None or (a.tries > 1 and a.at > at - 5)]
    recovered = max((a.at + a.took - at for a in harmed), default=0.0)
    whole = [a.took for a in clients.done if a.by is not None]
    return {
        "tries": clients.tries,
        "requests": len(clients.done),
        "lost": sum(a.by is None for a in clients.done),
        "tried again": sum(a.tries > 1 for a in clients.done),
        "seconds from the kill to the last harmed request's end": round(recovered, 2),
        "documents on one server before": len(single),
        "documents by server before": Counter(single),
        "documents on one server after": sum(len(by) == 1 for by in after.values()),
        "documents that moved": sum(bool(after[d] - before[d]) for d in after),
        "p50 s": shown_percentile(whole, 0.5),
        "p99 s": shown_percentile(whole, 0.99),
        "answers from the cache": round(sum(a.cached > 0 for a in clients.done) / max(len(clients.done), 1), 3),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run without retries and with them, and print what happened."""
    args = parse(argv)
    runs = [one_run(args, tries) for tries in (1, args.retries)]
    options = {name: value for name, value in vars(args).items() if name != "out"}
    found = {"options": options, "machine": machine(), "runs": runs}
    print(json.dumps(runs, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
