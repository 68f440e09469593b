"""A server that says what a test tells it, on a real socket, and keeps what it was asked."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

RASD = {"id": "one", "owned_by": "rasd", "max_model_len": 2048}
VLLM = {"id": "one", "owned_by": "vllm", "max_model_len": 4096}
OTHER = {"id": "one", "owned_by": "somebody"}


def piece(reason: str | None = None, own: Any = None, **delta: Any) -> dict[str, Any]:
    """Return a chunk of a streamed chat answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return {"choices": [choice | ({"rasd": own} if own is not None else {})]}


def usage(prompt: int = 7, answer: int = 2, cached: int = 0, thoughts: int = 0) -> dict[str, Any]:
    """Return the chunk behind the last one."""
    counted = {
        "prompt_tokens": prompt, "completion_tokens": answer,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": thoughts},
    }  # fmt: skip
    return {"choices": [], "usage": counted}


ANSWER = (piece(content="Four"), piece(content="."), piece("stop"), usage())


@dataclass
class Says:
    """One answer over HTTP.

    Attributes:
        events: What is streamed; text is sent as it is, a number waits so many seconds.
        status: Of HTTP; any but 200 is no stream, and ``body`` is what it says.
        body: Of what is no stream.
        headers: More of them.
        whole: The stream has its end; else the connection is cut.
    """

    events: Sequence[Any] = ANSWER
    status: int = 200
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    whole: bool = True


@dataclass
class FakeServer:
    """What it says and what it was asked.

    Attributes:
        base_url: For OpenAI's clients.
        cards: The models that it lists; ``None``: it has no list.
        says: Its answers, in order; the last one is repeated.
        bodies: What was asked of it, in order.
        paths: Where.
        headers: With which headers.
        asked: Set once an answer was asked for.
        left: Set once a client has gone in the middle of an answer.
        connections: Open ones.
        opened: How many there were.
    """

    base_url: str = ""
    cards: list[dict[str, Any]] | None = field(default_factory=lambda: [RASD])
    says: list[Says] = field(default_factory=lambda: [Says()])
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)
    connections: set[Any] = field(default_factory=set)
    opened: int = 0

    def next(self) -> Says:
        return self.says.pop(0) if len(self.says) > 1 else self.says[0]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: FakeServer

    def setup(self) -> None:
        super().setup()
        self.told.connections.add(self.client_address)
        self.told.opened += 1

    def finish(self) -> None:
        with suppress(OSError):
            super().finish()
        self.told.connections.discard(self.client_address)

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self.told.headers.append({n.lower(): v for n, v in self.headers.items()})
        self.told.paths.append(self.path)
        if self.told.cards is None:
            self._plain(404, {"detail": "Not Found"})
        else:
            self._plain(200, {"object": "list", "data": self.told.cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.told.bodies.append(body)
        self.told.paths.append(self.path)
        self.told.headers.append({n.lower(): v for n, v in self.headers.items()})
        self.told.asked.set()
        says = self.told.next()
        if says.status != 200 or says.body is not None:
            self._plain(says.status, says.body, says.headers)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(says)
        except OSError:
            self.told.left.set()
            self.close_connection = True

    def _stream(self, says: Says) -> None:
        for event in says.events:
            if isinstance(event, int | float):
                self._wait(event)
                continue
            text = event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n"
            self._send(text.encode())
        if says.whole:
            self._send(b"data: [DONE]\n\n")
            self._send(b"")
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _wait(self, seconds: float) -> None:
        """Wait, or raise once the client hangs up."""
        ends = time.monotonic() + seconds
        self.connection.setblocking(False)
        try:
            while time.monotonic() < ends:
                with suppress(BlockingIOError):
                    if self.connection.recv(1, socket.MSG_PEEK) == b"":
                        raise ConnectionResetError
                time.sleep(0.005)
        finally:
            self.connection.setblocking(True)

    def _send(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _plain(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def fake_server(
    *says: Says, cards: list[dict[str, Any]] | str | None = "ours"
) -> Iterator[FakeServer]:
    """Serve until the block ends."""
    told = FakeServer(cards=[RASD] if cards == "ours" else cards)  # type: ignore[arg-type]
    told.says = list(says) or [Says()]
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"told": told}))
    server.daemon_threads = True
    told.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
