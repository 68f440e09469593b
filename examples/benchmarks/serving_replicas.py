r"""Put two servers behind vllm-router or Ray Serve, kill one under load, and count what is lost and what moves.

Each document is asked about again and again, with its own ``X-Session-ID``. The router is a package of its own:
``pip install vllm-router`` (in any environment). ``--router ray`` needs the extra ``ray``, as ``.venv-ray`` of
``make test-ray`` has it; Ray starts the servers itself, and another for the killed one.

    python examples/benchmarks/serving_replicas.py --router vllm-router --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
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
    parser.add_argument("--router", default="vllm-router", help="its command, or ray")
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
                by = got.headers.get("x-rasd-replica", said["model"])
                return Asked(started - self.begun, took, document, by, attempt, cached)
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


@dataclass(frozen=True, slots=True)
class Replicas:
    """Two servers behind one address: their processes by name, the spreader's, and the seconds until it answered."""

    url: str
    up: float
    servers: Callable[[], Mapping[str, int]]
    spreader: Callable[[], Iterable[int]]


Start = Callable[..., int]
"""Starts a command, which ends with the run, and returns its process."""


def behind_router(args: argparse.Namespace, start: Start) -> Replicas:
    """Start two servers, then the router."""
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
    router = start(
        args.router, "--port", str(own), "--policy", args.policy, "--prometheus-port", str(told),
        "--health-check-endpoint", "/ready", "--health-check-interval-secs", "2", "--worker-urls",
        *(f"http://127.0.0.1:{port}" for port in ports),
    )  # fmt: skip
    url = f"http://127.0.0.1:{own}"
    return Replicas(url, wait_for(f"{url}/health"), lambda: servers, lambda: [router])


def behind_ray(args: argparse.Namespace, start: Start) -> Replicas:
    """Start Ray with two replicas."""
    flags = args.serve.replace("--", "").split()
    settings = dict(zip(flags[::2], flags[1::2], strict=True))
    own, board, token = free_port(), "http://127.0.0.1:8265", secrets.token_hex(32)
    config = {
        "http_options": {"host": "127.0.0.1", "port": own},
        "applications": [{
            "name": "default", "import_path": "rasd_integrations.ray:app",
            "args": {"model": args.model, **settings},
            "deployments": [{"name": "rasd", "num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}],
        }],
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", delete=False) as file:
        json.dump(config, file)
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
    }
    ray = start(str(Path(sys.executable).with_name("serve")), "run", file.name)
    up = wait_for(f"http://127.0.0.1:{own}/ready")

    def servers() -> Mapping[str, int]:
        headers = {"Authorization": f"Bearer {token}"}
        told = httpx.get(f"{board}/api/serve/applications/", headers=headers, timeout=30).json()
        deployment = told["applications"]["default"]["deployments"]["rasd"]
        return {
            r["replica_id"]: r["pid"] for r in deployment["replicas"] if r["state"] == "RUNNING"
        }

    ends = time.monotonic() + _START_S
    while len(servers()) < 2 and time.monotonic() < ends:
        time.sleep(0.2)
    return Replicas(
        f"http://127.0.0.1:{own}", up, servers, lambda: below(ray) - {*servers().values()}
    )


def below(process: int) -> set[int]:
    """Return a process and all that it or they have started."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parents[int(path.parent.name)] = int(
                path.read_text("ascii", "replace").rpartition(")")[2].split()[1]
            )
    found, new = {process}, {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= new
    return found


def mib(processes: Iterable[int]) -> int:
    """Return the memory of processes, in which what several share counts once."""
    found = 0
    for process in processes:
        with suppress(OSError):
            told = Path(f"/proc/{process}/smaps_rollup").read_text("ascii")
            found += int(re.findall(r"^Pss:\s+(\d+)", told, re.MULTILINE)[0])
    return found // 1024


def one_run(args: argparse.Namespace, tries: int) -> dict[str, Any]:
    """Start two servers and what spreads requests over them, kill the busier one under load; return what happened."""
    with ExitStack() as stack:

        def start(*command: str) -> int:
            quiet = subprocess.DEVNULL
            process = subprocess.Popen(command, stdout=quiet, stderr=quiet)  # noqa: S603

            def end() -> None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

            stack.callback(end)
            return process.pid

        started = behind_ray if args.router == "ray" else behind_router
        found = started(args, start)
        clients = Clients(found.url, args, tries)

        def kill() -> None:
            busy = Counter(a.by for a in clients.done if a.by).most_common(1)[0][0]
            os.kill(found.servers()[str(busy)], signal.SIGKILL)

        clients.begun = time.monotonic()
        at = asyncio.run(clients.run(kill))
        memory = mib(found.spreader())
    return {"router up s": round(found.up, 2), "router MiB": memory, **outcome(clients, at)}


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
        "seconds from the kill to the first answer of another server": came(clients.done, at),
        "p50 s": shown_percentile(whole, 0.5),
        "p99 s": shown_percentile(whole, 0.99),
        "answers from the cache": round(sum(a.cached > 0 for a in clients.done) / max(len(clients.done), 1), 3),
    }  # fmt: skip


def came(done: list[Asked], at: float) -> float | None:
    """Return how long after the kill a server answered that was not there before, if one did."""
    known = {a.by for a in done if a.at < at}
    new = [a.at + a.took - at for a in done if a.by is not None and a.by not in known]
    return round(min(new), 2) if new else None


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
