"""What the routes of a server share: engines, places, keys, limits and counters."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from dataclasses import replace

from fastapi import Request
from starlette.requests import ClientDisconnect

from rasd_integrations.config import check_value
from rasd_integrations.errors import PromptError, PromptTooLongError, ServerError
from rasd_integrations.runtime import pipeline
from rasd_integrations.runtime.rasd import RASD
from rasd_integrations.serving.reading import Asked
from rasd_integrations.serving.server.answers import ClientLeftError
from rasd_integrations.serving.server.engines import Engines
from rasd_integrations.serving.server.formats import Json
from rasd_integrations.serving.server.metrics import Metrics
from rasd_integrations.serving.server.places import Places
from rasd_integrations.serving.server.settings import ServerSettings
from rasd_integrations.serving.wire import OWN

_BODY_S = 60.0  # in which a body must arrive


class Server:
    """What the routes share: engines, places, keys and counters.

    Attributes:
        ready: The model is loaded.
        draining: The server ends, and takes no new requests.
        card: What clients cannot know of the loaded model.
    """

    def __init__(self, settings: ServerSettings, engines: Engines) -> None:
        """Load nothing yet."""
        self.settings, self.engines = settings, engines
        self.base = engines.get("", {})  # kept, so that the weights are
        self.name = settings.name or settings.model
        self.places = Places(settings.streams, settings.queue)
        self.metrics = Metrics(lambda: self.places.running, lambda: self.places.waiting)
        self.created = int(time.time())
        self.ready = self.draining = False
        self.card: Json = {}
        self._namespaces = {_digest(key): space for key, space in settings.namespaces.items()}

    def load(self) -> None:
        """Load the model."""
        base = self.base
        base.ensure_loaded()
        own = {
            "chat_template": base.has_chat_template,
            "reasoning": base.has_reasoning,
            "max_tokens": self._longest(base),
        }
        self.card = {"max_model_len": base.window, OWN: own}
        self.ready = True

    def _longest(self, engine: RASD) -> int:
        """Return the length of the longest answer of a request without ``max_tokens``."""
        most = self.settings.answer_tokens
        return engine.max_tokens if most is None else min(most, engine.max_tokens)

    def check_ready(self) -> None:
        """Raise ``ServerError`` (503) while the model loads, and once the server ends."""
        if self.draining or not self.ready:
            why = "The server ends" if self.draining else "The model is being loaded"
            msg = f"{why}. Ask again later."
            raise ServerError(msg, 503)

    def namespace(self, request: Request) -> str:
        """Return the namespace of a request's key.

        Raises:
            ServerError: The key is missing or unknown (401).
        """
        if not self._namespaces:
            return ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        found = self._namespaces.get(_digest(key.strip())) if scheme.lower() == "bearer" else None
        if found is None:
            msg = "The API key is missing or unknown. Send it as: Authorization: Bearer KEY"
            raise ServerError(msg, 401)
        return found

    async def body(self, request: Request) -> Json:
        """Return the JSON object of a request.

        Raises:
            ServerError: It is too large, too slow, or no JSON.
            PromptError: It is JSON, but no object.
        """
        # A page in a browser could send a form to this machine's port, but no JSON.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            msg = "The body must be JSON. Send the header Content-Type: application/json"
            raise ServerError(msg, 415)
        try:
            raw = await asyncio.wait_for(self._raw(request), _BODY_S)
        except asyncio.TimeoutError:
            msg = f"The body did not arrive within {_BODY_S:g} seconds."
            raise ServerError(msg, 408) from None
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError) as err:
            msg = f"The body is no JSON: {err}."
            raise PromptError(msg) from err
        if not isinstance(found, dict):
            msg = f"The body is a JSON {type(found).__name__}, but must be an object."
            raise PromptError(msg)
        return found

    async def _raw(self, request: Request) -> bytes:
        limit, parts, size = self.settings.body_bytes, list[bytes](), 0
        try:
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limit:
                    msg = f"The body is over the limit of {limit} bytes. Send less text."
                    raise ServerError(msg, 413)
        except ClientDisconnect:
            msg = "The client left before its body was whole."
            raise ClientLeftError(msg) from None
        return b"".join(parts)

    def check_model(self, name: str) -> None:
        """Raise ``ServerError`` (404) for a model that is not served; no name is any model."""
        if name not in ("", self.name):
            msg = f"The model {name!r} is not served here. There is {self.name!r}."
            raise ServerError(msg, 404)

    def limited(self, engine: RASD, asked: Asked) -> Asked:
        """Return what is asked for within the server's limits on tokens; tokenises, so not on the event loop.

        Raises:
            ConfigurationError: A longer answer is asked for.
            PromptTooLongError: A prompt is longer.
        """
        return replace(asked, requests=tuple(self._limited(engine, r) for r in asked.requests))

    def _limited(self, engine: RASD, request: pipeline.Request) -> pipeline.Request:
        params, most, longest = (
            request.params,
            self.settings.answer_tokens,
            self.settings.prompt_tokens,
        )
        if longest is not None:
            tokens = engine.count_tokens(request.prompt, request.tools)
            if tokens > longest:
                raise PromptTooLongError(tokens, 0, longest)
        if most is None:
            return request
        asked = params.max_tokens
        check_value(asked is None or asked <= most, "max_tokens", asked, f"at most {most} here")
        tokens = self._longest(engine) if asked is None else asked
        return replace(request, params=replace(params, max_tokens=tokens))


def _digest(key: str) -> bytes:
    """Return a key's hash: the time to look it up says nothing of the keys that there are."""
    return hashlib.sha256(key.encode()).digest()
