r"""Load a server with honest and rude clients, and compare every finished answer with its sequential one.

Clients hang up, send bad bodies, read slowly and come in floods. Memory, open files, threads and latencies of the
server are recorded to the end.

    python examples/benchmarks/serving_load.py --model small --seconds 600 --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
from machine import machine

from rasd_integrations.serving.plan import percentile

BAD_BODIES: tuple[bytes, ...] = (
    b"{", b"[]", b"null", b"\xff\xfe",
    b'{"messages": []}', b'{"messages": 3}', b'{"messages": [{"role": "user"}], "n": 0}',
    b'{"messages": [{"role": "user", "content": "Hi"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', b'{"messages": ' + b"[" * 50_000,
)  # fmt: skip
SHARES = {"whole": 45, "stream": 20, "leave": 12, "abandon": 6, "bad": 9, "slow": 8}
"""How often a client does what, in percent."""
_ANSWER, _FLOOD, _FLOOD_EVERY_S, _HANG_S = 24, 80, 20.0, 120.0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="small", help="what rasd serve takes")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--streams", type=int, default=8, help="of the server")
    parser.add_argument("--queue", type=int, default=48, help="of the server")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", default="--deterministic", help="further flags of rasd serve")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def questions(count: int) -> list[list[dict[str, str]]]:
    """Return conversations about pages of our own docs, some with a long document."""
    docs = sorted((Path(__file__).parents[2] / "docs" / "how-to").glob("*.md"))
    out = []
    for number in range(count):
        text = docs[number % len(docs)].read_text(encoding="utf-8")[: 400 + 300 * (number % 5)]
        ask = f"{text}\n\nQuestion {number}: what is this page about?"
        out.append([{"role": "user", "content": ask}])
    return out


@dataclass
class Told:
    """What happened.

    Attributes:
        counts: How each request ended.
        seconds: When each whole answer came, and how long it took.
        wrong: Answers that differ from their sequential ones.
        foreign: Statuses and errors that nothing explains.
    """

    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[tuple[float, float]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


class Load:
    """Clients of one server."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        """Ask nothing yet."""
        self.url, self.args = url, args
        self.asks = questions(args.questions)
        self.expected: list[str] = []
        self.told = Told()
        self.begun = 0.0

    def body(self, number: int, **more: Any) -> dict[str, Any]:
        """Return the request for a question."""
        return {"messages": self.asks[number], "max_tokens": _ANSWER, **more}

    async def run(self) -> None:
        """Ask each question alone, then all clients at once until the time is over."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=_HANG_S, limits=limits) as client:
            for number in range(len(self.asks)):
                got = await client.post(self.url, json=self.body(number))
                got.raise_for_status()
                self.expected.append(_content(got.json()))
            self.begun = time.monotonic()
            tasks = [self._client(client, n) for n in range(self.args.clients)]
            await asyncio.gather(*tasks, self._floods(client))

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.begun + self.args.seconds - time.monotonic()

    async def _client(self, client: httpx.AsyncClient, number: int) -> None:
        draw = random.Random(self.args.seed * 1000 + number)
        while self.left > 0:
            (act,) = draw.choices([*SHARES], [*SHARES.values()])
            await self._guarded(act, getattr(self, f"_{act}")(client, draw))
            await asyncio.sleep(draw.random() * 0.2)

    async def _guarded(self, act: str, doing: Any) -> None:
        try:
            self.told.counts[await doing] += 1
        except httpx.TimeoutException:
            self.told.counts["hang"] += 1
            self.told.foreign.append(f"{act}: no answer within {_HANG_S:g} s")
        except httpx.HTTPError as err:
            self.told.counts["foreign"] += 1
            self.told.foreign.append(f"{act}: {type(err).__name__}: {err}")

    async def _floods(self, client: httpx.AsyncClient) -> None:
        draw = random.Random(self.args.seed)
        while self.left > 0:
            await asyncio.sleep(min(_FLOOD_EVERY_S, max(self.left, 0)))
            flood = (self._guarded("flood", self._whole(client, draw)) for _ in range(_FLOOD))
            if self.left > 0:
                await asyncio.gather(*flood)

    async def _whole(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        number, started = draw.randrange(len(self.asks)), time.monotonic()
        got = await client.post(self.url, json=self.body(number))
        if got.status_code == 429 and got.headers.get("retry-after"):
            return "refused (429)"
        if got.status_code != 200:
            return self._foreign(f"whole: {got.status_code} {got.text[:200]}")
        self.told.seconds.append((started - self.begun, time.monotonic() - started))
        return self._judged(number, _content(got.json()))

    async def _stream(
        self, client: httpx.AsyncClient, draw: random.Random, pause: float = 0.0
    ) -> str:
        number = draw.randrange(len(self.asks))
        text: list[str] = []
        async with client.stream("POST", self.url, json=self.body(number, stream=True)) as got:
            if got.status_code == 429:
                return "refused (429)"
            if got.status_code != 200:
                return self._foreign(f"stream: {got.status_code}")
            ended = False
            async for line in got.aiter_lines():
                await asyncio.sleep(pause)
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return self._foreign(f"stream: {event}")
                    text += [c["delta"].get("content") or "" for c in event["choices"]]
        return self._judged(number, "".join(text)) if ended else self._foreign("stream: cut")

    async def _slow(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        return await self._stream(client, draw, pause=0.2)

    async def _leave(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        number, lines = draw.randrange(len(self.asks)), draw.randrange(1, 8)
        async with client.stream("POST", self.url, json=self.body(number, stream=True)) as got:
            async for _ in got.aiter_lines():
                lines -= 1
                if lines == 0:
                    break
        return "left"

    async def _abandon(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        number = draw.randrange(len(self.asks))
        with suppress(httpx.TimeoutException):
            await client.post(self.url, json=self.body(number), timeout=draw.uniform(0.02, 0.5))
        return "left"

    async def _bad(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        kind = {"content-type": "application/json"}
        got = await client.post(self.url, content=draw.choice(BAD_BODIES), headers=kind)
        if got.status_code == 400 and got.json()["error"]["message"]:
            return "bad body refused (400)"
        return self._foreign(f"bad: {got.status_code} {got.text[:200]}")

    def _judged(self, number: int, text: str) -> str:
        if text == self.expected[number]:
            return "equal"
        self.told.wrong.append(f"{number}: {text[:80]!r} for {self.expected[number][:80]!r}")
        return "wrong"

    def _foreign(self, what: str) -> str:
        self.told.foreign.append(what)
        return "foreign"


def _content(body: dict[str, Any]) -> str:
    return body["choices"][0]["message"]["content"] or ""


def state(pid: int) -> dict[str, int]:
    """Return memory (MiB), open files and threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    rss, threads = (
        int(re.findall(rf"{name}:\s+(\d+)", status)[0]) for name in ("VmRSS", "Threads")
    )
    return {
        "mib": rss // 1024,
        "files": len([*Path(f"/proc/{pid}/fd").iterdir()]),
        "threads": threads,
    }


async def watched(load: Load, pid: int) -> list[dict[str, Any]]:
    """Run the load; return the server's state through it, and after it is idle again."""
    states: list[dict[str, Any]] = []
    running = asyncio.create_task(load.run())
    while not running.done():
        await asyncio.wait([running], timeout=max(load.args.seconds / 40, 0.5))
        if load.begun:
            states.append({"at": round(time.monotonic() - load.begun, 1), **state(pid)})
    await running
    await asyncio.sleep(3)
    return [*states, {"at": round(time.monotonic() - load.begun, 1), **state(pid)}]


def shown_percentile(values: list[float], share: float) -> float | None:
    """Return a percentile of ``values`` to a millisecond; ``None`` if there are none."""
    return round(percentile(values, share), 3) if values else None


def summary(load: Load, states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the run shows."""
    told, quarter = load.told, load.args.seconds / 4
    quarters = [[s for at, s in told.seconds if n * quarter <= at < (n + 1) * quarter] for n in range(4)]  # fmt: skip
    settled = [s for s in states if s["at"] >= load.args.seconds / 4] or states
    return {
        "options": {k: v for k, v in vars(load.args).items() if k != "out"},
        "machine": machine(),
        "counts": dict(sorted(told.counts.items())),
        "wrong": told.wrong[:20],
        "foreign": told.foreign[:20],
        "seconds by quarter": [
            {"answers": len(q), "p50": shown_percentile(q, 0.5), "p99": shown_percentile(q, 0.99)}
            for q in quarters
        ],
        "memory growth after the first quarter": round(
            settled[-1]["mib"] / settled[0]["mib"] - 1, 4
        ),
        "states": states,
    }


async def served(
    server: subprocess.Popen[str], args: argparse.Namespace, kept: TextIO
) -> tuple[Load, list[dict[str, Any]]]:
    """Load a server that has just been started, and end it; its log is ``kept``."""
    if server.stderr is None:
        sys.exit("The server has no output.")
    url = ""
    for line in server.stderr:
        url = next(iter(re.findall(r"http://\S+/v1", line)), url)
        if line.startswith("ready"):
            break
    else:
        sys.exit("The server did not start.")
    reading = asyncio.create_task(asyncio.to_thread(kept.writelines, server.stderr))
    load = Load(f"{url}/chat/completions", args)
    states = await watched(load, server.pid)
    server.terminate()
    await reading
    await asyncio.to_thread(server.wait)
    server.stderr.close()
    return load, states


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Serve, load, end the server by SIGTERM, and print what happened."""
    args = parse(argv)
    command = [
        sys.executable, "-m", "rasd_integrations", "serve", args.model, "--port", "0", "--streams", str(args.streams),
        "--queue", str(args.queue), *args.serve.split(),
    ]  # fmt: skip
    log = Path(args.out).with_suffix(".log") if args.out else Path(os.devnull)
    with log.open("w", encoding="utf-8") as kept:
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: S603
        try:
            load, states = asyncio.run(served(server, args, kept))
        finally:
            server.kill()
            server.wait()
    found = summary(load, states) | {"exit status": server.returncode}
    shown = {k: v for k, v in found.items() if k not in ("states", "machine", "options")}
    print(json.dumps(shown, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
