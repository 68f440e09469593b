"""``rasd serve``: binds the port, loads the model, and drains when it is told to end."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from rasd_integrations.errors import ConfigurationError
from rasd_integrations.serving.server.app import build_app
from rasd_integrations.serving.server.engines import engines_for
from rasd_integrations.serving.server.service import Server
from rasd_integrations.serving.server.settings import ServerSettings


class _Uvicorn(uvicorn.Server):
    """Marks the server as draining at the first signal; the second ends it at once, as uvicorn's does."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._own = server
        self.failed: Exception | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no new requests; those that run may end. uvicorn's own would then die of the signal."""
        if self._own.draining:
            self.force_exit = True
        self._own.draining = self.should_exit = True

    def load(self) -> None:
        """Load the model; a failure ends the server."""
        started = time.perf_counter()
        try:
            self._own.load()
        except Exception as err:  # noqa: BLE001  (raised again in the main thread)
            self.failed = err
            self.should_exit = True
        else:
            window = self._own.base.window
            _say(f"ready after {time.perf_counter() - started:.1f} s; window {window} tokens")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then load: health is answered meanwhile."""
        await super().startup(sockets)
        threading.Thread(target=self.load, name="rasd-load", daemon=True).start()


def serve(flags: Mapping[str, Any], file: str | Path | None = None) -> None:
    """Serve until a signal ends it.

    Args:
        flags: Settings by name, before those of the environment and the file.
        file: Of settings, in TOML.

    Raises:
        ConfigurationError: Settings that cannot work.
        RASDError: The store or the model cannot be opened.
    """
    settings = ServerSettings.read(flags, file)
    log_to_stderr(settings.log_format)
    engines = engines_for(settings)
    server = Server(settings, engines)
    config = uvicorn.Config(
        build_app(server),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(int(settings.drain_seconds), 0) or None,
        h11_max_incomplete_event_size=64 << 10,
    )
    own = _Uvicorn(config, server)
    listening = _listening(settings.host, settings.port)
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    _say(f"serving {server.name} at http://{shown}:{listening.getsockname()[1]}/v1 (OpenAI's API)")
    try:
        own.run([listening])
    finally:
        engines.close()
    if own.failed is not None:
        raise own.failed


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigurationError: The address is taken, or is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as err:
        msg = f"host {host!r} and port {port} cannot be listened on: {err}. Give another port, or 0 for a free one."
        raise ConfigurationError(msg) from err


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201  (a command says what it does)


class _Json(logging.Formatter):
    """One JSON object a line; of a request, its numbers."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's line."""
        told = {"time": round(record.created, 3), "level": record.levelname.lower()}
        told |= getattr(record, "request", None) or {"message": record.getMessage()}
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


def log_to_stderr(form: str) -> None:
    """Write the package's log to stderr, as text or as JSON."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_Json() if form == "json" else text)
    own = logging.getLogger("rasd_integrations")
    own.handlers, own.propagate = [handler], False
    own.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
