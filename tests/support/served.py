"""Runs a server in this process, on a real socket, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import uvicorn

from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.serving.server.app import build_app
from rasd_integrations.serving.server.engines import Engines
from rasd_integrations.serving.server.service import Server
from rasd_integrations.serving.server.settings import ServerSettings


def engines_over(model: Any, tokenizer: Any, **options: Any) -> Engines:
    """Return the engines of a loaded model."""

    def make(namespace: str, template_kwargs: Mapping[str, Any]) -> RASD:
        own = {"namespace": namespace, "chat_template_kwargs": dict(template_kwargs)}
        return RASD.from_model(model, tokenizer, **{**own, **options})

    return Engines(make)


class Served:
    """A running server.

    Attributes:
        root: Its address.
        base_url: For OpenAI's clients.
        server: What its routes share.
    """

    def __init__(self, port: int, server: Server) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.root}/v1"
        self.server = server

    def settles(self, seconds: float = 5.0) -> bool:
        """Return if no answer runs or waits within this time."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if not self.server.places.running and not self.server.places.waiting:
                return True
            time.sleep(0.01)
        return False


@contextmanager
def served(engines: Engines, *, load: bool = True, **settings: Any) -> Iterator[Served]:
    """Serve until the block ends."""
    server = Server(ServerSettings.read({"model": "tiny", **settings}), engines)
    if load:
        server.load()
    config = uvicorn.Config(
        build_app(server), port=0, log_config=None, access_log=False, lifespan="off"
    )
    own = uvicorn.Server(config)
    thread = threading.Thread(target=own.run, daemon=True)
    thread.start()
    while not own.started:
        time.sleep(0.005)
    try:
        yield Served(own.servers[0].sockets[0].getsockname()[1], server)
    finally:
        own.should_exit = True
        thread.join(10)
